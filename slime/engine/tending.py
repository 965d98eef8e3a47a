"""The engines of a host and a task for each that looks after it: what health.py decides is done here.

An engine is looked at every WATCH_S: whether its process lives, and now and then whether its scheduler answers a probe (its HTTP process
alone says little). While an update works on it, the update's own deadlines hold and no probe counts. A DEAD server of slime's is killed
with its whole process group, which works on stopped processes too, and started anew at its old address; a STALE engine is brought to the
committed weights, proven. A server of the user's is probed, but never killed: it is DEAD until it answers again, then STALE.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

from slime.config import RolloutConfig
from slime.engine.errors import EngineError
from slime.engine.health import Health, State, Trouble, Turn
from slime.engine.live import LiveEngine
from slime.engine.ports import is_free
from slime.engine.server import ServerSpec
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


class Tending:
    """See the module. `start` makes a new server at the address of one that ended and waits until it answers."""

    def __init__(self, cfg: RolloutConfig, bring: Bring, start: Callable[[ServerSpec], Awaitable[LiveEngine]]) -> None:
        self._cfg, self._bring, self._start = cfg, bring, start
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
                    return
                case State.DEAD if server is not None:
                    await self._restart(one, server.spec)
                case State.STALE:
                    await self._catch_up(one)
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
        """Kill what is left of it, and start it anew at its address."""
        assert one.engine.server is not None
        await asyncio.to_thread(one.engine.server.stop)
        one.health.restarting()
        if one.health.state is not State.RESTARTING:
            return
        if one.health.restarts > 1:
            await asyncio.sleep(min(BACK_OFF_MOST_S, BACK_OFF_S * 2 ** (one.health.restarts - 2)))
        give_up_s = time.monotonic() + PORT_S
        while not is_free(*spec.address) and time.monotonic() < give_up_s:
            await asyncio.sleep(WATCH_S)
        try:
            one.engine = await self._start(spec)
        except (EngineError, TimeoutError, OSError, ValueError) as error:
            one.health.failed(f"it did not start anew: {error}")
        else:
            one.health.up(time.monotonic())

    async def _catch_up(self, one: Tended) -> None:
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
