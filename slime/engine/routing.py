"""Which engine gets a request. A pure state machine: no network, no clock.

    FENCED   its weights are unknown or not the expected ones; gets nothing
    READY    holds the expected weights
    DEAD     it is out: its connection broke, or its host agent says so; gets nothing until the agent says that it is back

A session (the ordinal of a prompt) stays with the engine that got its first request, whose cache holds the prompt; it moves when that
engine is not ready, is full, or has much more to do than the least loaded one.

An engine that has said how many requests it runs at once gets a few more, which are there when one ends, and is full then. Whatever waits
beyond that waits for the engine that is free first: where some answers are long, no request queues behind them while another engine idles.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from slime.engine.errors import EngineError

SESSIONS = 65536  # remembered; the longest unused is forgotten
QUEUED = 0.125  # share of what an engine runs at once that may wait in it
SLACK = 16  # requests by which an engine may exceed twice the least load before sessions leave it


class State(Enum):
    FENCED = "fenced"
    READY = "ready"
    DEAD = "dead"


@dataclass
class Slot:
    """What the router knows of one engine."""

    name: str
    state: State = State.FENCED
    reason: str = "its weights are not known yet"
    load: int = 0  # requests under way
    life: int = 0  # how often its host agent has brought it back
    runs: int | None = None  # requests at once, as it says

    @property
    def full(self) -> bool:
        return self.runs is not None and self.load >= math.ceil(self.runs * (1 + QUEUED))


class Router:
    """Engines are known by their position."""

    def __init__(self, names: list[str]) -> None:
        assert names, "a router needs an engine"
        self.slots = [Slot(name) for name in names]
        self._sessions: OrderedDict[int, int] = OrderedDict()

    def add(self, name: str) -> None:
        """One more engine, fenced."""
        self.slots.append(Slot(name))

    def ready(self, engine: int) -> None:
        """It answers, and holds the expected weights."""
        self.slots[engine].state, self.slots[engine].reason = State.READY, ""

    def fence(self, engine: int, reason: str) -> None:
        """It holds other weights, or unknown ones. A dead engine stays dead."""
        slot = self.slots[engine]
        if slot.state is not State.DEAD:
            slot.state, slot.reason = State.FENCED, reason

    def dead(self, engine: int, reason: str) -> None:
        self.slots[engine].state, self.slots[engine].reason = State.DEAD, reason

    def back(self, engine: int, life: int) -> None:
        """Its host agent says that it serves again. It is fenced until it is `ready`; one that was never out stays as it is."""
        slot = self.slots[engine]
        if slot.state is State.DEAD or life != slot.life:
            slot.state, slot.reason, slot.life = State.FENCED, "it is back, and what it holds is not known yet", life

    @property
    def open(self) -> bool:
        """Whether any engine is ready."""
        return any(slot.state is State.READY for slot in self.slots)

    def said(self) -> str:
        """Every engine's state in words."""
        return "; ".join(f"{slot.name} is {slot.state.value}: {slot.reason}" for slot in self.slots)

    def acquire(self, session: int | None = None) -> int | None:
        """The engine for a request of `session`; `release` it afterwards. None where every one that is ready is full. Raises EngineError
        where none is ready, saying why."""
        if not self.open:
            raise EngineError(f"no engine can answer: {self.said()}")
        with_room = [i for i, slot in enumerate(self.slots) if slot.state is State.READY and not slot.full]
        if not with_room:
            return None
        least = min(with_room, key=lambda i: (self.slots[i].load, i))
        chosen = least if session is None else self._sticky(session, least)
        self.slots[chosen].load += 1
        return chosen

    def release(self, engine: int) -> None:
        """A request that `acquire` placed there has ended."""
        assert self.slots[engine].load > 0, f"{self.slots[engine].name} has no request to release"
        self.slots[engine].load -= 1

    def _sticky(self, session: int, least: int) -> int:
        engine = self._sessions.get(session, least)
        slot = self.slots[engine]
        if slot.state is not State.READY or slot.full or slot.load > 2 * self.slots[least].load + SLACK:
            engine = least
        self._sessions[session] = engine
        self._sessions.move_to_end(session)
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return engine
