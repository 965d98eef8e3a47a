"""One prompt to one group: n samples, generated side by side, judged together."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slime.config import SlimeConfig
from slime.engine.errors import EngineError
from slime.rollout.client import RolloutClient
from slime.rollout.rewards.judge import Judge
from slime.types import Group, Prompt, Sample

T = TypeVar("T")


@dataclass
class GroupMaker:
    """Makes the groups of one rollout or evaluation set; `judged` collects every sample that was given to the reward function."""

    cfg: SlimeConfig
    client: RolloutClient
    judge: Judge
    generate: Callable[..., Awaitable[Any]]  # rollout.generate
    judged: list[Sample] = field(default_factory=list)
    judging: list[tuple[float, float]] = field(default_factory=list)  # when, seconds since 1970

    async def make(self, prompt: Prompt, prompt_ids: list[int], count: int) -> Group:
        """The rewarded group of a prompt. Raises what `rollout.generate` raises, and ValueError where it returns no samples."""
        made = await together(self._sample(prompt, prompt_ids, index) for index in range(count))
        group = Group(prompt.ordinal, [s for several in made for s in several])
        begun_s = time.time()
        await self.judge.judge(group.samples)
        self.judging.append((begun_s, time.time()))
        self.judged += group.samples
        return group

    async def _sample(self, prompt: Prompt, prompt_ids: list[int], index: int) -> list[Sample]:
        sample = Sample(
            prompt=prompt.prompt,
            prompt_ids=list(prompt_ids),
            group=prompt.ordinal,
            index=index,
            label=prompt.label,
            source=prompt.source,
            metadata=prompt.metadata,
            seed=sampling_seed(self.cfg.run.seed, prompt.ordinal, index) if self.cfg.run.deterministic else None,
        )
        try:
            made = await self.generate(sample, self.client, self.cfg.rollout)
        except (EngineError, TimeoutError):
            raise
        except Exception as error:
            named = f"rollout.generate={self.cfg.rollout.generate} failed on sample {index} of prompt {prompt.ordinal}"
            raise RuntimeError(f"{named}: {type(error).__name__}: {error}") from error
        samples = made if isinstance(made, list) else [made]
        if not samples:
            raise ValueError(f"rollout.generate={self.cfg.rollout.generate} returned no sample for prompt {prompt.ordinal}")
        for s in samples:
            if not isinstance(s, Sample):
                raise ValueError(
                    f"rollout.generate={self.cfg.rollout.generate} returned {type(s).__name__}; return a Sample or a list of them"
                )
            s.check()
        return samples


async def together(coroutines: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, in order. When one raises, the others are cancelled."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def sampling_seed(run_seed: int, ordinal: int, index: int) -> int:
    """31-bit seed of one sample, from what it is and not from when it is drawn."""
    digest = hashlib.blake2b(f"{run_seed}/{ordinal}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
