"""Waiting for Ray with a deadline, and errors that say what was waited for.

An exception raised in a remote method arrives with its own type and text; the remote traceback is chained to it (`__cause__`)
for the log. What Ray itself reports becomes a `RuntimeError` (a process died) or a `TimeoutError` (nothing came in time).

A constructor's exception loses its type on Ray's way back; actors therefore do what can fail for a user in a `start` method.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError


def get(refs: "ray.ObjectRef | Sequence[ray.ObjectRef]", timeout_s: float, what: str, knob: str | None = None) -> Any:
    """The value of a reference, or the values of several.

    `what` completes "waiting for ..."; `knob` is the deadline's own knob, named when it passes.
    Raises TimeoutError after `timeout_s` seconds, RuntimeError where a process died, and the remote exception where one was raised.
    """
    try:
        return ray.get(list(refs) if isinstance(refs, Sequence) else refs, timeout=timeout_s)
    except RayError as error:
        if isinstance(error, GetTimeoutError) and not isinstance(error, RayTaskError):
            raise _late(timeout_s, what, knob) from None
        _raise(error, what)


async def get_async(refs: "ray.ObjectRef | Sequence[ray.ObjectRef]", timeout_s: float, what: str, knob: str | None = None) -> Any:
    """`get` for a coroutine: the event loop goes on meanwhile."""
    several = list(refs) if isinstance(refs, Sequence) else [refs]
    try:
        values = await asyncio.wait_for(asyncio.gather(*several), timeout_s)
    except TimeoutError as error:
        if isinstance(error, RayError):
            _raise(error, what)
        raise _late(timeout_s, what, knob) from None
    except RayError as error:
        _raise(error, what)
    return values if isinstance(refs, Sequence) else values[0]


def _late(timeout_s: float, what: str, knob: str | None) -> TimeoutError:
    return TimeoutError(f"waiting for {what}: nothing after {timeout_s:g} s" + (f" ({knob})" if knob else ""))


def _raise(error: RayError, what: str) -> NoReturn:
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if not isinstance(cause, RayError):
        raise cause from error
    raise RuntimeError(f"waiting for {what}: {_reason(cause)}") from error


def _reason(error: RayError) -> str:
    """What happened, in one line, out of Ray's report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        return f"its process failed to start: {lines[-1]}"
    detail = next((line for line in lines if line.startswith(("The actor died", "The actor is dead"))), lines[0])
    return f"a process died or was lost ({type(error).__name__}): {detail}"
