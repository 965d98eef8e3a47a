"""What a reward function returned, as a reward and metrics or as an error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slime.types import Sample

REWARD_KEYS = ("score", "reward")  # verl's name and ours for the reward of a dict


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement: a finite reward, or the reason why there is none. An error is not a zero."""

    reward: float | None
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def write_to(self, sample: Sample) -> None:
        sample.reward, sample.reward_error, sample.metrics = self.reward, self.error, dict(self.metrics)


def read_verdict(raw: Any) -> Verdict:
    """A number is the reward; of a dict, "score" or "reward" is, and its other numbers are metrics.

    Anything else, and a number that is not finite, is an error that says what came.
    """
    if not isinstance(raw, Mapping):
        return _verdict(raw, {})
    key = next((k for k in REWARD_KEYS if k in raw), None)
    if key is None:
        return Verdict(None, f"the reward function returned a dict without score or reward; it has {', '.join(map(str, raw)) or 'nothing'}")
    extras = {str(name): number for name, value in raw.items() if name != key and (number := as_number(value)) is not None}
    return _verdict(raw[key], {name: number for name, number in extras.items() if math.isfinite(number)})


def read_verdicts(raw: Any, count: int) -> list[Verdict]:
    """What a function of a whole group returned: one reward or dict a sample, in order."""
    values = list(raw) if isinstance(raw, list | tuple) or _is_array(raw) else None
    if values is None or len(values) != count:
        got = type(raw).__name__ if values is None else f"{len(values)} values"
        return [Verdict(None, f"the reward function of a group returned {got}; it must return a list of {count}, one a sample")] * count
    return [read_verdict(value) for value in values]


def as_number(value: Any) -> float | None:
    """`value` as a float where it is a number (bool, int, float, or a NumPy or torch scalar), else None."""
    if isinstance(value, str | bytes | bytearray) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError for a tensor of several elements
        return None


def _verdict(value: Any, metrics: dict[str, float]) -> Verdict:
    number = as_number(value)
    if number is None:
        return Verdict(None, f"the reward function returned {_shown(value)}, not a number")
    if not math.isfinite(number):
        return Verdict(None, f"the reward function returned {number}, which is not finite")
    return Verdict(number, metrics=metrics)


def _is_array(value: Any) -> bool:
    return type(value).__name__ in ("ndarray", "Tensor")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
