"""Waiting for Ray with a deadline, and errors that say what was waited for.

An exception raised in a remote method arrives with its own type and text; the remote traceback is chained to it (`__cause__`)
for the log. What Ray itself reports becomes `ProcessLost` (a process or host is gone), a `RuntimeError` (an object store is full) or a
`TimeoutError` (nothing came in time).

Ray is silent about the end of its own processes: who has started it hands `watch` a look at them, which every wait takes now and then.

A constructor's exception loses its type on Ray's way back; actors therefore do what can fail for a user in a `start` method.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

STEP_KNOB = "cluster.step_timeout_s"  # the deadline of whatever a step waits for
LOOK_S = 1.0  # between two looks at Ray's own processes


class ProcessLost(RuntimeError):
    """A process, its host or Ray itself is gone. Nothing is wrong with the recipe: the run can go on from its last checkpoint."""


class ClusterLost(ProcessLost):
    """Ray itself is gone, and with it everything that ran in it."""


class _Watch:
    """What a wait looks at meanwhile: raises ClusterLost where Ray itself is gone."""

    look: Callable[[], None] = staticmethod(lambda: None)


@contextlib.contextmanager
def watch(look: Callable[[], None]) -> Iterator[None]:
    """While entered, every wait of this process calls `look` about once a second."""
    before, _Watch.look = _Watch.look, look
    try:
        yield
    finally:
        _Watch.look = before


def check() -> None:
    """Raises ClusterLost where Ray itself is gone; for waits of another kind."""
    _Watch.look()


def get(
    refs: "ray.ObjectRef | Sequence[ray.ObjectRef]",
    timeout_s: float,
    what: str,
    knob: str | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """The value of a reference, or the values of several.

    `what` completes "waiting for ..."; `knob` is the deadline's own knob, named when it passes; `meanwhile` is called about once a second.
    Raises TimeoutError after `timeout_s` seconds, ProcessLost where a process died, and the remote exception where one was raised.
    """
    asked, until = list(refs) if isinstance(refs, Sequence) else refs, time.monotonic() + timeout_s
    while True:
        left_s = max(0.0, until - time.monotonic())
        try:
            return ray.get(asked, timeout=min(left_s, LOOK_S))
        except RayError as error:
            if not isinstance(error, GetTimeoutError) or isinstance(error, RayTaskError):
                _raise(error, what)
        if left_s <= LOOK_S:
            raise _late(timeout_s, what, knob)
        check()
        meanwhile()


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
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        raise RuntimeError(f"waiting for {what}: {_full(cause)}") from error
    raise ProcessLost(f"waiting for {what}: {_reason(cause)}") from error


def _full(error: ObjectStoreFullError | OutOfDiskError) -> str:
    """Where Ray has no room, and what to do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full = "the disk to which Ray spills objects" if isinstance(error, OutOfDiskError) else "Ray's object store"
    mend = "raise cluster.object_store_mb (or start the cluster's nodes with a larger --object-store-memory), or lower the batch: "
    return f"{full} is full ({lines[0] if lines else type(error).__name__}); {mend}rollout.prompts_per_step, sync.bucket_mb"


def _reason(error: RayError) -> str:
    """What happened, in one line, out of Ray's report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        return f"its process failed to start: {lines[-1]}"
    detail = next((line for line in lines if line.startswith(("The actor died", "The actor is dead"))), lines[0])
    return f"a process died or was lost ({type(error).__name__}): {detail}"
