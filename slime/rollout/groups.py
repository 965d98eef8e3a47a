"""One prompt to one group: n samples, generated side by side, judged together."""

import asyncio
import copy
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slime.config import SlimeConfig
from slime.engine.errors import EngineError
from slime.rollout.client import RolloutClient
from slime.rollout.metrics import Asked
from slime.rollout.rewards.judge import Judge
from slime.types import Group, Prompt, Sample

T = TypeVar("T")


@dataclass
class GroupMaker:
    """Makes the groups of one rollout, or of the evaluation set `eval_set`; `judged` collects every sample that was judged."""

    cfg: SlimeConfig
    client: RolloutClient
    judge: Judge
    generate: Callable[..., Awaitable[Any]]  # rollout.generate
    eval_set: str | None = None
    judged: list[Sample] = field(default_factory=list)
    judging: list[tuple[float, float]] = field(default_factory=list)  # when, seconds since 1970
    asked: list[Asked] = field(default_factory=list)  # of served teachers

    async def make(self, prompt: Prompt, prompt_ids: list[int], count: int) -> Group:
        """The rewarded group of a prompt. Raises what `rollout.generate` raises, and ValueError where it returns no proper samples."""
        made = await together(self._sample(prompt, prompt_ids, index) for index in range(count))
        group = Group(prompt.ordinal, [s for several in made for s in several])
        begun_s = time.time()
        await self.judge.judge(group.samples)
        self.judging.append((begun_s, time.time()))
        self.judged += group.samples
        return group

    async def _sample(self, prompt: Prompt, prompt_ids: list[int], index: int) -> list[Sample]:
        try:
            made = await self.generate(self._blank(prompt, prompt_ids, index), self.client, self.cfg.rollout)
        except (EngineError, TimeoutError):
            raise
        except Exception as error:
            named = f"rollout.generate={self.cfg.rollout.generate} failed on sample {index} of prompt {prompt.ordinal}"
            raise RuntimeError(f"{named}: {type(error).__name__}: {error}") from error
        samples = made if isinstance(made, list) else [made]
        if not samples:
            raise ValueError(f"rollout.generate={self.cfg.rollout.generate} returned no sample for prompt {prompt.ordinal}")
        for s in samples:
            self._check(s, prompt)
        return samples

    def _blank(self, prompt: Prompt, prompt_ids: list[int], index: int) -> Sample:
        """A sample to be filled. What it holds is its own: a generate function may write to it."""
        deterministic, seed = self.cfg.run.deterministic, self.cfg.run.seed
        return Sample(
            prompt=copy.deepcopy(prompt.prompt),
            prompt_ids=list(prompt_ids),
            group=prompt.ordinal,
            index=index,
            label=copy.deepcopy(prompt.label),
            source=prompt.source,
            metadata=copy.deepcopy(prompt.metadata),
            seed=sampling_seed(seed, prompt.ordinal, index, self.eval_set) if deterministic else None,
        )

    def _check(self, s: Any, prompt: Prompt) -> None:
        """Raises ValueError for what a generate function must not return."""
        returned, limit = f"rollout.generate={self.cfg.rollout.generate} returned", self.client.sampling.max_new_tokens
        if not isinstance(s, Sample):
            raise ValueError(f"{returned} {type(s).__name__}; return a Sample or a list of them")
        if s.group != prompt.ordinal:
            raise ValueError(
                f"{returned} a sample of group {s.group} for prompt {prompt.ordinal}; fill the sample that it is given, or copy it with "
                f"dataclasses.replace"
            )
        s.check()
        if not any(s.loss_mask):
            raise ValueError(f"{returned} a sample without tokens to train on for prompt {prompt.ordinal}; append_answer adds them")
        if len(s.response_ids) > limit:
            knob = "rollout.max_response_tokens" if self.eval_set is None else f"data.eval.{self.eval_set}.max_response_tokens"
            raise ValueError(
                f"{returned} {len(s.response_ids)} response tokens for prompt {prompt.ordinal}, above {knob}={limit}; stop at "
                f"client.sampling.max_new_tokens, tool results included, or raise {knob}"
            )


async def together(coroutines: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in order. When one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def sampling_seed(run_seed: int, ordinal: int, index: int, eval_set: str | None = None) -> int:
    """31-bit seed of one sample, from what it is and not from when it is drawn. Each evaluation set has seeds of its own."""
    what = f"{run_seed}/{ordinal}/{index}" if eval_set is None else f"{run_seed}/{ordinal}/{index}/{eval_set}"
    digest = hashlib.blake2b(what.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
