"""Supervised examples as batches: the prompt, and the label with the end token as the response."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import ray

from slime.config import SlimeConfig
from slime.data.source import PromptSource
from slime.data.template import load_tokenizer, tokenize
from slime.engine.endpoint import Endpoint
from slime.engine.health import Turn
from slime.rollout.draw import Draw
from slime.rollout.handle import Evaluated, Pending, Ready, RolloutResult
from slime.rollout.metrics import example, response_lengths
from slime.types import Batch, Group, Prompt, RolloutSummary, Sample, WeightVersion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Demonstrations:
    """rollout.prompts_per_step examples a step, drawn from data.train by ordinal."""

    def __init__(self, cfg: SlimeConfig) -> None:
        """Raises ValueError for data files or a tokenizer that cannot be used."""
        self._cfg = cfg
        self._source = PromptSource(cfg.data, cfg.run.seed)
        self._tokenizer = load_tokenizer(cfg.model)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"model.path={cfg.model.path}: the tokenizer has no end token, so an answer could never end; set eos_token")

    def start(self, step: int, first_ordinal: int) -> Pending[RolloutResult]:
        draw = Draw(first_ordinal, self._cfg.rollout.prompts_per_step)
        groups: list[Group] = []
        while (ordinal := draw.take()) is not None:
            sample = demonstration(self._source.prompt(ordinal), self._tokenizer, self._cfg)
            if sample is None:
                draw.drop(ordinal, "too_long")
            else:
                draw.keep(ordinal)
                groups.append(Group(ordinal, [sample]))
        metrics = response_lengths([g.samples[0] for g in groups])
        shown = [example(g.samples[0]) | {"reward": None} for g in groups[: self._cfg.observe.examples]]
        summary = RolloutSummary(step, draw.drawn, first_ordinal, sorted(draw.kept), draw.dropped, metrics, shown)
        return Ready(step, RolloutResult(ray.put(Batch.from_groups(groups)), summary))

    def add(self, endpoint: Endpoint) -> None:
        raise AssertionError("no engine answers")

    def expect(self, version: WeightVersion) -> None:
        """No engines answer here."""

    def engines(self, turns: Sequence[Turn]) -> None:
        """No engines answer here."""

    def evaluate(self, step: int) -> Pending[Evaluated]:
        return Ready(step, ([], []))

    def probe(self, step: int, batch: "ray.ObjectRef", logprobs: np.ndarray) -> Pending[dict[str, float]]:
        raise AssertionError("no engine answers")

    def stop(self) -> None:
        pass


def demonstration(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", cfg: SlimeConfig) -> Sample | None:
    """The example of a prompt, None where prompt or answer is too long. Raises ValueError for a label that is not text."""
    ids = tokenize(prompt, tokenizer, cfg.data)
    if not isinstance(prompt.label, str):
        raise ValueError(
            f"prompt {prompt.ordinal} of {prompt.source}: its label is the answer (algorithm.name=sft) and is not text; set data.label_key"
        )
    response = [*tokenizer(prompt.label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if ids is None or len(response) > cfg.rollout.max_response_tokens:
        return None
    return Sample(
        prompt=prompt.prompt,
        prompt_ids=ids,
        group=prompt.ordinal,
        label=prompt.label,
        source=prompt.source,
        metadata=prompt.metadata,
        response_ids=response,
        text=prompt.label,
        loss_mask=[1] * len(response),
        rollout_logprobs=[0.0] * len(response),
        reward=0.0,
        finish_reason="stop",
    )
