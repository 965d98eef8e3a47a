"""Reward functions written for other frameworks, called as they expect. What they get is theirs to read, not to write."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from slime.config import RewardConfig
from slime.types import Sample


class ReadOnly:
    """Named values as attributes. Raises AttributeError for a name that is not there, saying which are, and for every assignment."""

    __slots__ = ("_values", "_what")

    def __init__(self, what: str, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_what", what)
        object.__setattr__(self, "_values", MappingProxyType(dict(values)))

    def __getattr__(self, name: str) -> Any:
        values = object.__getattribute__(self, "_values")
        if name not in values:
            raise AttributeError(f"{self._what}.{name} is not offered to a reward function; there are {', '.join(values)}")
        return values[name]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"{self._what}.{name} is read-only: return the reward, and further numbers in a dict beside it")

    def __repr__(self) -> str:
        return f"{self._what}({', '.join(self._values)})"


def call_verl(fn: Callable[..., Any], sample: Sample) -> Any:
    """verl's compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict."""
    return fn(data_source=sample.source, solution_str=sample.text, ground_truth=sample.label, extra_info=dict(sample.metadata))


def call_slime(fn: Callable[..., Any], args: ReadOnly, sample: Sample) -> Any:
    """custom_rm(args, sample) of slime's argparse days, usually async, -> float | dict."""
    return fn(args, slime_sample(sample))


def slime_args(cfg: RewardConfig) -> ReadOnly:
    """What such a function may read from its `args`: the reward's own options."""
    return ReadOnly("args", {"rm_type": cfg.fn, "rm_url": cfg.url, "custom_rm_path": cfg.fn, "reward_key": None, "group_rm": False})


def slime_sample(sample: Sample) -> ReadOnly:
    """A sample under the names that such a function knows."""
    return ReadOnly(
        "sample",
        {
            "prompt": sample.prompt,
            "response": sample.text,
            "label": sample.label,
            "metadata": MappingProxyType(sample.metadata),
            "tokens": (*sample.prompt_ids, *sample.response_ids),
            "response_length": len(sample.response_ids),
            "loss_mask": tuple(sample.loss_mask),
            "group_index": sample.group,
            "index": sample.index,
            "status": "truncated" if sample.truncated else "completed",
            "source": sample.source,
        },
    )
