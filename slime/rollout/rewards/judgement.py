"""A reward function of any signature as one form: samples in, verdicts out. Runs in a worker process."""

import asyncio
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.config import RewardConfig
from slime.config.imports import load_function
from slime.rollout.rewards.adapters import call_slime, call_verl, slime_args
from slime.rollout.rewards.builtin import builtin
from slime.rollout.rewards.verdict import Verdict, read_verdict, read_verdicts
from slime.types import Sample


@dataclass(frozen=True)
class Judgement:
    """`call` takes the samples of one judgement (a group, or a list of one) and returns what the user's function returned."""

    call: Callable[[list[Sample]], Any]
    is_async: bool
    of_group: bool

    def run(self, samples: list[Sample]) -> list[Verdict]:
        """Judge by a synchronous function; whatever it raises is an error of these samples."""
        try:
            return self._read(self.call(samples), len(samples))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            return self._failed(error, len(samples))

    async def run_async(self, samples: list[Sample], timeout_s: float) -> list[Verdict]:
        """Judge by an asynchronous function, which is cancelled after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return self._read(await self.call(samples), len(samples))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            return late(timeout_s, len(samples)) if limit.expired() else self._failed(error, len(samples))

    def _read(self, raw: Any, count: int) -> list[Verdict]:
        return read_verdicts(raw, count) if self.of_group else [read_verdict(raw)]

    def _failed(self, error: Exception, count: int) -> list[Verdict]:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [Verdict(None, f"the reward function raised {type(error).__name__}: {error} ({where.filename}:{where.lineno})")] * count


def late(timeout_s: float, count: int) -> list[Verdict]:
    """The verdicts of a judgement that took too long."""
    return [Verdict(None, f"the reward function took longer than reward.timeout_s={timeout_s:g}")] * count


def load_judgement(cfg: RewardConfig, knob: str) -> Judgement:
    """The judgement that cfg.fn and cfg.signature name. Raises ValueError naming `knob` for a function that cannot be loaded."""
    fn: Callable[..., Any] | None = builtin(cfg, knob)
    if fn is not None:
        return _of_samples(fn)
    fn = load_function(cfg.fn, knob)
    is_async = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)
    if cfg.signature == "group":
        return Judgement(fn, is_async, of_group=True)
    if cfg.signature == "verl":
        return Judgement(lambda samples: call_verl(fn, samples[0]), is_async, of_group=False)
    if cfg.signature == "slime":
        args = slime_args(cfg)
        return Judgement(lambda samples: call_slime(fn, args, samples[0]), is_async, of_group=False)
    return Judgement(lambda samples: fn(samples[0]), is_async, of_group=False)


def _of_samples(fn: Callable[[Sample], float]) -> Judgement:
    return Judgement(lambda samples: fn(samples[0]), is_async=False, of_group=False)
