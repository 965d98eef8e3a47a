"""The pool of reward workers. A judgement that crashes or hangs costs itself and a restart of its worker, nothing else."""

import asyncio

from slime.config import RewardConfig
from slime.rollout.rewards.judgement import late
from slime.rollout.rewards.process import Worker, WorkerLost
from slime.rollout.rewards.verdict import Verdict
from slime.types import Sample

TOGETHER = 256  # judgements of an asynchronous function at once in one worker
GRACE_S = 1.0  # beyond its deadline, for an asynchronous function to be cancelled inside its worker


class WorkerPool:
    """`reward.workers` processes. Make it where an event loop runs, `start` it, and `close` it."""

    def __init__(self, cfg: RewardConfig, knob: str) -> None:
        """`knob` is where the recipe names the function."""
        self._cfg = cfg
        self._workers = [Worker(cfg, knob) for _ in range(cfg.workers)]
        self._idle: asyncio.LifoQueue[Worker] = asyncio.LifoQueue()
        self._slots = asyncio.Semaphore(TOGETHER * cfg.workers)
        self._alone = Worker(cfg, knob)  # judges again, one by one, what was under way in a worker that died
        self._one_by_one = asyncio.Lock()

    async def start(self) -> None:
        """Start every worker. Raises ValueError naming the knob of a function that cannot be loaded."""
        outcomes = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
        failed = [outcome for outcome in outcomes if outcome is not None]
        if failed:
            await self.close()
            raise failed[0]
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def judge(self, samples: list[Sample]) -> list[Verdict]:
        """The verdicts of one judgement: the samples of a group, or one sample."""
        return await (self._judge_together(samples) if self._workers[0].is_async else self._judge_in_turn(samples))

    async def close(self) -> None:
        """End every worker."""
        await asyncio.gather(*(worker.kill() for worker in (*self._workers, self._alone)))

    async def _judge_in_turn(self, samples: list[Sample]) -> list[Verdict]:
        """A synchronous function: a worker of its own for as long as it takes."""
        worker = await self._idle.get()
        try:
            return await self._within_deadline(worker, samples, self._cfg.timeout_s)
        except WorkerLost as error:
            return _lost(error, len(samples))
        except asyncio.CancelledError:
            await worker.kill()  # it is at work on what nobody waits for
            raise
        finally:
            self._idle.put_nowait(worker)

    async def _judge_together(self, samples: list[Sample]) -> list[Verdict]:
        """An asynchronous function: beside others. When they bring down the worker, each is judged again alone, to find which did."""
        async with self._slots:
            worker = min(self._workers, key=lambda w: w.load)
            try:
                async with asyncio.timeout(self._cfg.timeout_s + GRACE_S):
                    return await worker.judge(samples)
            except TimeoutError:
                await worker.kill()
            except WorkerLost:
                pass
            async with self._one_by_one:
                try:
                    return await self._within_deadline(self._alone, samples, self._cfg.timeout_s + GRACE_S)
                except WorkerLost as error:
                    return _lost(error, len(samples))

    async def _within_deadline(self, worker: Worker, samples: list[Sample], timeout_s: float) -> list[Verdict]:
        await worker.start()
        try:
            async with asyncio.timeout(timeout_s):
                return await worker.judge(samples)
        except TimeoutError:
            await worker.kill()
            return late(self._cfg.timeout_s, len(samples))


def _lost(error: WorkerLost, count: int) -> list[Verdict]:
    return [Verdict(None, f"the process of the reward function {error}")] * count
