"""Which engines may be used: a state machine for each, without clock and I/O; times are handed in. The host agent keeps one `Health` for
each engine and does what its state asks for (see tending.py); the driver and the client get its `Turn`s.

    HEALTHY     it answers and has proven the committed weights: the only state in which it gets requests
    SUSPECT     a probe was not answered, or the client lost it: no new requests; the next answer clears it
    DEAD        its process ended, it has not answered for rollout.health_timeout_s, or its answers are late or none
    RESTARTING  a new process comes up (of servers that slime started)
    STALE       it answers; its weights are not the committed ones, not proven, or its memory is released (see tenancy.py)
    RETIRED     it was brought back more than rollout.max_restarts times without a version published in between, or cannot be followed

                 HEALTHY     SUSPECT     DEAD                     RESTARTING  STALE
    answered     -           HEALTHY     STALE, if the user's     -           -
    missed       SUSPECT     -           -                        -           -
      too long   DEAD        DEAD        -                        -           DEAD
    ended        DEAD        DEAD        -                        DEAD        DEAD
    reported     see report  see report  -                        -           -
    stale        STALE       STALE       -                        -           -
    released     STALE       STALE       -                        -           -
    restarting   -           -           RESTARTING, if slime's   -           -
    up           -           -           -                        STALE       -
    caught_up    -           -           -                        -           HEALTHY
    failed       -           -           -                        DEAD        DEAD
    unfit        RETIRED     RETIRED     RETIRED                  RETIRED     RETIRED

What would lead to RESTARTING, or to STALE by answered, reported and stale, counts; beyond rollout.max_restarts it leads to RETIRED, which
is final. `-`: nothing changes.

An engine that the kernel stops while it generates, health_timeout_s=60:

    missed(now=2)       SUSPECT      its new requests go elsewhere
    missed(now=62)      DEAD         the agent kills the process group, its requests are asked again elsewhere
    restarting()        RESTARTING
    up(now=80)          STALE        it has the weights of model.path
    caught_up(now=85)   HEALTHY      life 1: what is reported of life 0 from here on is ignored
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    RETIRED = "retired"


class Kind(StrEnum):
    """What a client saw of an engine."""

    LOST = "lost"  # its connection was refused or broke
    LATE = "late"  # no answer in rollout.request_timeout_s
    GARBAGE = "garbage"  # an answer that cannot be one
    STALE = "stale"  # other weights than expected


@dataclass(frozen=True, slots=True)
class Trouble:
    """A request that failed. `life` is the engine's when the request was sent."""

    engine: str
    kind: Kind
    reason: str
    life: int


@dataclass(frozen=True, slots=True)
class Turn:
    """An engine has come into a state."""

    engine: str
    state: State
    reason: str
    life: int  # how often it has come back; -1 before its first proof
    tail: str = ""  # of its log, where it ended


class Health:
    """One engine, see the module. It begins STALE: up, with weights that are not proven yet."""

    def __init__(
        self, name: str, now: float, timeout_s: float, max_restarts: int, ours: bool, turned: Callable[[Turn], None] = lambda turn: None
    ) -> None:
        """`timeout_s` is rollout.health_timeout_s. `ours`: slime started it and can start it anew. `turned` is told every change."""
        self.name = name
        self.state = State.STALE
        self.reason = "its weights are not proven yet"
        self.life = -1
        self.restarts = 0  # since a version was published
        self._ours, self._timeout_s, self._max_restarts = ours, timeout_s, max_restarts
        self._heard_s = now
        self._turned = turned

    @property
    def routed(self) -> bool:
        """Whether it gets requests."""
        return self.state is State.HEALTHY

    def answered(self, now: float) -> None:
        """A probe was answered."""
        self._heard_s = now
        if self.state is State.SUSPECT:
            self._go(State.HEALTHY, "it answers")
        elif self.state is State.DEAD and not self._ours:
            self._again(State.STALE, "it answers again")

    def missed(self, now: float, why: str) -> None:
        """A probe was not."""
        if self.state not in (State.HEALTHY, State.SUSPECT, State.STALE):
            return
        if now - self._heard_s >= self._timeout_s:
            self._go(State.DEAD, f"no answer for {self._timeout_s:g} s (rollout.health_timeout_s): {why}")
        elif self.state is State.HEALTHY:
            self._go(State.SUSPECT, why)

    def at_work(self, now: float) -> None:
        """An update works on it, with deadlines of its own: no probe is expected to be answered."""
        self._heard_s = now

    def ended(self, reason: str) -> None:
        """Its process is gone, or was given up."""
        if self.state not in (State.DEAD, State.RETIRED):
            self._go(State.DEAD, reason)

    def reported(self, trouble: Trouble) -> None:
        """A client saw this. LOST makes it SUSPECT, LATE and GARBAGE make it DEAD, STALE makes it STALE."""
        if trouble.life != self.life or self.state not in (State.HEALTHY, State.SUSPECT):
            return
        if trouble.kind is Kind.STALE:
            self.stale(trouble.reason)
        elif trouble.kind is not Kind.LOST:
            self._go(State.DEAD, trouble.reason)
        elif self.state is State.HEALTHY:
            self._go(State.SUSPECT, trouble.reason)

    def stale(self, reason: str) -> None:
        """It holds other weights than the committed ones, or nobody knows."""
        if self.state in (State.HEALTHY, State.SUSPECT):
            self._again(State.STALE, reason)

    def released(self) -> None:
        """It has been asked to give up its memory: no failure, which does not count."""
        if self.state in (State.HEALTHY, State.SUSPECT):
            self._go(State.STALE, "its memory is released")

    def restarting(self) -> None:
        """A new process is started."""
        if self.state is State.DEAD and self._ours:
            self._again(State.RESTARTING, self.reason)

    def up(self, now: float) -> None:
        """The new process answers."""
        if self.state is State.RESTARTING:
            self._heard_s = now
            self._go(State.STALE, "it has started anew")

    def caught_up(self, now: float) -> None:
        """It has proven the committed weights."""
        if self.state is State.STALE:
            self._heard_s, self.life = now, self.life + 1
            self._go(State.HEALTHY, "it holds the committed weights, proven")

    def failed(self, reason: str) -> None:
        """It did not start, or not come to hold the committed weights."""
        if self.state in (State.RESTARTING, State.STALE):
            self._go(State.DEAD, reason)

    def unfit(self, reason: str) -> None:
        """No restart would make it hold the weights."""
        if self.state is not State.RETIRED:
            self._go(State.RETIRED, reason)

    def published(self) -> None:
        """A version was committed."""
        self.restarts = 0

    def _again(self, state: State, reason: str) -> None:
        """It is brought back once more, if it may."""
        self.restarts += 1
        if self.restarts > self._max_restarts:
            count = f"it was brought back {self._max_restarts} times since the last published weights (rollout.max_restarts)"
            self._go(State.RETIRED, f"{count}; the last time: {reason}")
        else:
            self._go(state, reason)

    def _go(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self._turned(Turn(self.name, state, reason, self.life))
