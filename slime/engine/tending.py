"""The engines of a host and a task for each that looks after it: what health.py decides is done here.

An engine is looked at every WATCH_S: whether its process lives, and now and then whether its scheduler answers a probe (its HTTP process
alone says little). While an update works on it, the update's own deadlines hold and no probe counts. A DEAD server of slime's is killed
with its whole process group, which works on stopped processes too, and started anew at its old address; a STALE engine is brought to the
committed weights, proven. A server of the user's is probed, but never killed: it is DEAD until it answers again, then STALE.

While the devices are the trainer's (tenancy.py, swapping.py), nothing is started and nothing is loaded.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from slime.config import RolloutConfig
from slime.config.exits import PreflightError
from slime.engine.errors import EngineError
from slime.engine.health import Health, State, Trouble, Turn
from slime.engine.live import LiveEngine
from slime.engine.ports import is_free
from slime.engine.server import ServerSpec
from slime.engine.tenancy import Tenancy
from slime.sync.inserver_client import RankError
from slime.sync.states import Fenced, Refused

WATCH_S = 0.5
PROBE_EVERY_S = 2.0
PROBE_MOST_S = 5.0  # in which a probe is answered, and at most half of rollout.health_timeout_s
PORT_S = 20.0  # for the kernel to free the port of a server that was killed
BACK_OFF_S, BACK_OFF_MOST_S = 1.0, 30.0  # before the second restart in a row, doubled for each further one
TURNS = 4096  # remembered for a driver that does not ask

Bring = Callable[[LiveEngine], Awaitable[None]]  # to the committed weights, proven


class Tended:
    """One engine, and what is known of its health."""

    def __init__(self, engine: LiveEngine, health: Health) -> None:
        self.engine, self.health = engine, health
        self.updates = 0  # that work on it now
        self.probe_s = 0.0  # time.monotonic() of the next probe
        self.nudge = asyncio.Event()  # something has changed
        self.starting: asyncio.Task[LiveEngine] | None = None  # its new process


class Tending:
    """See the module. `start` makes a new server at the address of one that ended and waits until it answers."""

    def __init__(self, cfg: RolloutConfig, bring: Bring, start: Callable[[ServerSpec], Coroutine[Any, Any, LiveEngine]]) -> None:
        self._cfg, self._bring, self._start = cfg, bring, start
        self.tenancy = Tenancy()
        self._tended: dict[str, Tended] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: list[Turn] = []
        self._first = 0  # number of the first of them
        self._news = asyncio.Event()

    @property
    def engines(self) -> list[LiveEngine]:
        return [one.engine for one in self._tended.values()]

    def add(self, engine: LiveEngine) -> None:
        """One more engine, STALE; it is looked after once it is `proven`."""
        name, ours = engine.endpoint.name, engine.server is not None
        cfg = self._cfg
        health = Health(name, time.monotonic(), cfg.health_timeout_s, cfg.max_restarts, ours, self._turned)
        self._tended[name] = Tended(engine, health)
        self.tenancy.add(name)

    def of(self, name: str) -> Tended:
        """The engine of this name, as it is now."""
        return self._tended[name]

    def nudge(self) -> None:
        """Look at all of them now."""
        for one in self._tended.values():
            one.nudge.set()

    def proven(self, names: Iterable[str]) -> None:
        """These hold the committed weights; they are looked after from here on."""
        for name in names:
            one = self._tended[name]
            one.health.caught_up(time.monotonic())
            if name not in self._tasks:
                self._tasks[name] = asyncio.create_task(self._tend(one))

    def published(self) -> None:
        """A version was committed."""
        for one in self._tended.values():
            one.health.published()

    @contextmanager
    def at_work(self, names: Iterable[str]) -> Iterator[None]:
        """An update works on these engines. Those that it gave up are dead afterwards."""
        worked = [self._tended[name] for name in names]
        for one in worked:
            one.updates += 1
        try:
            yield
        finally:
            for one in worked:
                one.updates -= 1
                one.health.at_work(time.monotonic())
                if one.engine.lost:
                    one.health.ended(f"an update got no answer: {one.engine.lost}")
                    one.engine.lost = ""
                one.nudge.set()

    def report(self, troubles: Iterable[Trouble]) -> None:
        """What clients saw."""
        for trouble in troubles:
            one = self._tended[trouble.engine]
            one.health.reported(trouble)
            one.probe_s = 0.0
            one.nudge.set()

    async def news(self, since: int, wait_s: float) -> tuple[int, list[Turn]]:
        """The turns from number `since` on, and the number to ask for next; waits up to `wait_s` for the first. What comes before `since`
        is forgotten. Raises what has ended a task, which is a defect."""
        self._turns, self._first = self._turns[max(0, since - self._first) :], max(since, self._first)
        if not self._turns and wait_s:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
        for task in self._tasks.values():
            if task.done() and not task.cancelled():
                task.result()
        return self._first + len(self._turns), list(self._turns)

    async def stop(self) -> None:
        """Look after nobody any more."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- one engine ---------------------------------------------------------------------------------------------------

    def _turned(self, turn: Turn) -> None:
        one = self._tended[turn.engine]
        if turn.state in (State.DEAD, State.RETIRED):
            one.engine.died()
        server = one.engine.server
        tail = server.tail() if server is not None and turn.state in (State.DEAD, State.RETIRED) else ""
        self._turns.append(Turn(turn.engine, turn.state, turn.reason, turn.life, tail))
        if len(self._turns) > TURNS:
            self._turns, self._first = self._turns[1:], self._first + 1
        self._news.set()
        one.nudge.set()

    async def _tend(self, one: Tended) -> None:
        while True:
            one.nudge.clear()
            server = one.engine.server
            match one.health.state:
                case State.RETIRED:
                    if server is not None:
                        await asyncio.to_thread(server.stop)
                    self.tenancy.ended(one.health.name)
                    return
                case State.DEAD if server is not None:
                    await self._restart(one, server.spec)
                case State.STALE if self.tenancy.resident(one.health.name):
                    await self.catch_up(one)
                case _:
                    await self._look(one)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(one.nudge.wait(), WATCH_S)

    async def _look(self, one: Tended) -> None:
        """Whether its process lives, it answers, and it was not fenced by an update."""
        engine, health = one.engine, one.health
        if engine.server is not None and not engine.server.alive:
            health.ended("its process ended")
        elif one.updates:
            health.at_work(time.monotonic())
        elif engine.state is not None and isinstance(engine.state.state, Fenced) and health.state is not State.DEAD:
            health.stale(engine.state.state.reason)
        elif time.monotonic() >= one.probe_s:
            missed = await engine.probe(min(PROBE_MOST_S, self._cfg.health_timeout_s / 2))
            now = time.monotonic()
            one.probe_s = now + min(PROBE_EVERY_S, self._cfg.health_timeout_s / 4)
            if not missed:
                health.answered(now)
            elif one.updates:
                health.at_work(now)
            else:
                health.missed(now, missed)

    async def _restart(self, one: Tended, spec: ServerSpec) -> None:
        """Kill what is left of it, and start it anew at its address, where and when the devices are the engines'."""
        assert one.engine.server is not None
        await asyncio.to_thread(one.engine.server.stop)
        self.tenancy.ended(one.health.name)
        if not self.tenancy.ours:
            return
        one.health.restarting()
        if one.health.state is not State.RESTARTING:
            return
        if one.health.restarts > 1:
            await asyncio.sleep(min(BACK_OFF_MOST_S, BACK_OFF_S * 2 ** (one.health.restarts - 2)))
        give_up_s = time.monotonic() + PORT_S
        while not is_free(*spec.address) and time.monotonic() < give_up_s:
            await asyncio.sleep(WATCH_S)
        try:
            one.engine = await self._started(one, spec)
        except (EngineError, PreflightError, TimeoutError, OSError, ValueError) as error:
            self.tenancy.ended(one.health.name)
            one.health.failed(f"it did not start anew: {error}")
        else:
            self.tenancy.started(one.health.name)
            one.health.up(time.monotonic())

    async def _started(self, one: Tended, spec: ServerSpec) -> LiveEngine:
        """A new process that answers. Raises EngineError where the devices are the trainer's, or become so meanwhile: it is ended then."""
        if not self.tenancy.may_start(one.health.name):
            raise EngineError("the trainer has its devices")
        one.starting = asyncio.create_task(self._start(spec))
        try:
            made = await one.starting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # this task is to end, and not the start alone
                raise
            raise EngineError("the trainer took its devices") from None
        finally:
            one.starting = None
        if not self.tenancy.ours:  # it had just answered
            assert made.server is not None
            await asyncio.to_thread(made.server.stop)
            raise EngineError("the trainer took its devices")
        return made

    async def catch_up(self, one: Tended) -> None:
        """Bring it to the committed weights, proven."""
        try:
            with self.at_work([one.health.name]):
                await self._bring(one.engine)
        except (EngineError, RankError, Refused, TimeoutError, OSError) as error:
            one.health.failed(f"it did not come to hold the committed weights: {error}")
        except ValueError as error:
            one.health.unfit(str(error))
        else:
            one.health.caught_up(time.monotonic())
