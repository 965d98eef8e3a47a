"""Gives samples their rewards, by whatever the recipe names: a function in worker processes, or a URL."""

import asyncio
from dataclasses import replace
from typing import Self

from slime.config import RewardConfig
from slime.rollout.rewards.url import UrlJudge
from slime.rollout.rewards.workers import WorkerPool
from slime.types import Sample


class Judge:
    """Sets `reward` and `metrics`, or `reward_error`, of every sample that it is given."""

    def __init__(self, backend: WorkerPool | UrlJudge, of_group: bool) -> None:
        self._backend = backend
        self._of_group = of_group

    @classmethod
    async def open(cls, cfg: RewardConfig, fn: str | None = None, knob: str = "reward.fn") -> Self:
        """The judge of a recipe; `fn` takes the place of reward.fn and reward.url (an evaluation set's own reward, from its `knob`).

        Raises ValueError naming the knob of a function that cannot be loaded.
        """
        if fn is not None:
            cfg = replace(cfg, fn=fn, url=None)
        if cfg.url is not None:
            return cls(UrlJudge(cfg), of_group=False)
        pool = WorkerPool(cfg, knob)
        await pool.start()
        return cls(pool, of_group=cfg.signature == "group" and ":" in cfg.fn)

    async def judge(self, samples: list[Sample]) -> None:
        """Judge the samples of one group, side by side or as a whole (reward.signature=group)."""
        parts = [samples] if self._of_group else [[sample] for sample in samples]
        verdicts = await asyncio.gather(*(self._backend.judge(part) for part in parts))
        for sample, verdict in zip(samples, (v for part in verdicts for v in part), strict=True):
            verdict.write_to(sample)

    async def close(self) -> None:
        await self._backend.close()
