"""What a generate function is given: the engines, the tokenizer, and the sampling of this rollout."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from slime.engine.client import EngineClient, Generation, Sampling
from slime.models.map import Routing
from slime.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RolloutClient:
    """Answers for token ids. One per rollout or evaluation set; `generations` collects every answer for the metrics."""

    engines: EngineClient
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling  # defaults of this rollout
    routing: Routing | None = None  # where the experts of every token are wanted
    generations: list[Generation] = field(default_factory=list)

    async def generate(
        self, sample: Sample, token_ids: Sequence[int], max_new_tokens: int | None = None, stop: Sequence[str] | None = None
    ) -> Generation:
        """Continue `token_ids`. Samples of one group go to one engine, whose cache holds their common prefix.

        Raises what EngineClient.generate raises: for ids outside the vocabulary, a refusal, and where three answers failed or no engine
        came back in time.
        """
        sampling = replace(
            self.sampling,
            max_new_tokens=self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
            stop=self.sampling.stop if stop is None else tuple(stop),
            seed=sample.seed,
        )
        answer = await self.engines.generate(list(token_ids), sampling, session=sample.group, routing=self.routing)
        self.generations.append(answer)
        return answer
