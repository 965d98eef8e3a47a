"""Whether a user's function takes what slime calls it with. A callable whose signature Python cannot tell is left to the run."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.config.exits import ConfigError


@dataclass(frozen=True)
class Call:
    """How slime calls a function: by position, or by name."""

    positional: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"fn({', '.join([*self.positional, *(f'{name}=...' for name in self.named)])})"


GENERATE = Call(("sample", "client", "cfg"))
FILTER = Call(("group",))
REWARDS = {  # reward.signature -> the call, see slime/rollout/rewards/judgement.py
    "sample": Call(("sample",)),
    "group": Call(("samples",)),
    "verl": Call(named=("data_source", "solution_str", "ground_truth", "extra_info")),
    "slime": Call(("args", "sample")),
}


def check_call(named: str, fn: Callable[..., Any], call: Call) -> None:
    """Raise ConfigError for a function that `call` would fail on. `named` is how the recipe names it, knob=value."""
    if problem := refusal(fn, call):
        raise ConfigError(f"{named}: slime calls it as {call}, and {_written(fn)} does not take that ({problem})")


def check_reward(named: str, fn: Callable[..., Any], signature: str) -> None:
    """Raise ConfigError for a reward that reward.signature does not fit, naming the signature that does."""
    verls = signature != "verl" and "solution_str" in _parameters(fn)
    problem = refusal(fn, REWARDS[signature])
    if not verls and not problem:
        return
    fits = "verl" if verls else next((other for other in ("slime", "sample") if refusal(fn, REWARDS[other]) is None), None)
    mend = f"set reward.signature={fits}" if fits else f"reward.signature is one of {', '.join(REWARDS)}"
    called = f"slime calls it as {REWARDS[signature]} (reward.signature={signature})"
    reason = f", and {_written(fn)} has the parameters of verl's" if verls else f", and {_written(fn)} does not take that ({problem})"
    raise ConfigError(f"{named}: {called}{reason}; {mend}")


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; also for an object with such a __call__."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def always_true(fn: Callable[..., Any]) -> str | None:
    """What calling it returns where that is true whatever the function says: a coroutine or a generator."""
    if is_async(fn):
        return "a coroutine"
    return "a generator" if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn) else None


def refusal(fn: Callable[..., Any], call: Call) -> str | None:
    """Why a call would fail, in Python's words; None where it would not, or where Python cannot tell."""
    signature = _signature(fn)
    if signature is None:
        return None
    try:
        signature.bind(*call.positional, **dict.fromkeys(call.named))
    except TypeError as error:
        return str(error)
    return None


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (ValueError, TypeError):  # of C, or hidden by a decorator
        return None


def _parameters(fn: Callable[..., Any]) -> tuple[str, ...]:
    signature = _signature(fn)
    return tuple(signature.parameters) if signature else ()


def _written(fn: Callable[..., Any]) -> str:
    """fn(its, parameters), without annotations."""
    signature = _signature(fn)
    shown = []
    for parameter in signature.parameters.values() if signature else ():
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        shown.append(f"{stars}{parameter.name}" + ("" if parameter.default is inspect.Parameter.empty else "=..."))
    return f"{getattr(fn, '__name__', type(fn).__name__)}({', '.join(shown)})"
