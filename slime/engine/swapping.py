"""The engines of a host leave their devices to the trainer, and come back: what tenancy.py says is done here (cluster.share=swap).

What an engine holds lies in the memory that it gives up; its process stays, with its map of where weights live. While it is away it is
STALE: paused, without requests, and not probed into anything. When it comes back it is loaded whole from the host copy and proven, and
what it has beside its weights is proven to be as before. One that fails is killed and started anew, as after any failure; the devices
are not left before the kernel has its process no more.
"""

import asyncio
import contextlib

from slime.engine.errors import EngineError
from slime.engine.health import State
from slime.engine.live import LiveEngine
from slime.engine.tenancy import Do, Place
from slime.engine.tending import Tended, Tending

POLL_S = 0.05
KILL_S = 60.0  # for a process group that was killed to be gone
FAILURES = (EngineError, TimeoutError, OSError)


async def leave(tending: Tending, timeout_s: float, answer_s: float) -> None:
    """No engine has memory when this returns. An engine has `timeout_s` to end what is done with it, and `answer_s` to give up its memory.
    Raises EngineError where a process that was killed is not gone after KILL_S seconds."""
    due = tending.tenancy.leave()
    await asyncio.gather(*(_leave(tending, tending.of(name), do, timeout_s, answer_s) for name, do in due.items()))
    if not tending.tenancy.free:
        stay = [name for name in due if tending.tenancy.place(name) not in (Place.AWAY, Place.GONE)]
        raise EngineError(f"{', '.join(stay)} could not be ended: the memory of its devices is not free")


async def enter(tending: Tending, timeout_s: float) -> None:
    """The devices are the engines' again: those that are away are back and proven, or have been killed; those that have ended are about to
    be started anew."""
    due = tending.tenancy.enter()
    tending.nudge()
    await asyncio.gather(*(_come(tending, tending.of(name), timeout_s) for name in due))


async def _leave(tending: Tending, one: Tended, do: Do, timeout_s: float, answer_s: float) -> None:
    engine, name = one.engine, one.health.name
    if do is Do.KILL:
        await _kill(tending, one, engine, "the trainer takes its devices, and it was not ready to leave them")
        return
    try:
        async with asyncio.timeout(timeout_s):
            while one.updates:  # it is being brought to the committed weights
                await asyncio.sleep(POLL_S)
        with tending.at_work([name]):
            if one.health.state in (State.DEAD, State.RETIRED):
                raise EngineError(one.health.reason)
            one.health.released()
            async with asyncio.timeout(answer_s):
                await engine.release(answer_s)
    except FAILURES as error:
        late = f"nothing after {answer_s:g} s (rollout.health_timeout_s)"
        await _kill(tending, one, engine, f"it did not give up its memory: {str(error) or late}")
    else:
        tending.tenancy.released(name)


async def _come(tending: Tending, one: Tended, timeout_s: float) -> None:
    engine, name = one.engine, one.health.name
    try:
        with tending.at_work([name]):
            await engine.take_back(timeout_s)
    except FAILURES as error:
        await _kill(tending, one, engine, f"it did not take its memory back: {error}")
        return
    if one.engine is engine and one.health.state is State.STALE:
        await tending.catch_up(one)
    if one.health.state is State.HEALTHY:
        tending.tenancy.came(name)
    else:
        await _kill(tending, one, engine, one.health.reason)
    one.nudge.set()


async def _kill(tending: Tending, one: Tended, engine: LiveEngine, why: str) -> None:
    """End the process that `engine` is, or the one that is about to replace it, unless somebody else has meanwhile."""
    tenancy, name = tending.tenancy, one.health.name
    place = tenancy.place(name)
    if tenancy.failed(name) is not Do.KILL:
        return
    if place is Place.STARTING:
        if one.starting is not None:
            one.starting.cancel()
    else:
        one.health.ended(why)
        assert engine.server is not None, "servers of the user's do not swap"
        await asyncio.to_thread(engine.server.stop)
        if tenancy.place(name) is place:
            tenancy.ended(name)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_S):
            while tenancy.place(name) is place:
                await asyncio.sleep(POLL_S)
