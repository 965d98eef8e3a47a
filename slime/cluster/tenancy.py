"""Trainer and engines on the same devices, of which one at a time has the memory (cluster.share=swap): whose turn it is.

    tenancy = Tenancy(trainer, engines)     both have been started, one after the other; the engines have the memory
    tenancy.have(TRAINER)                   engines.leave(), trainer.enter(): {"time/release_s": 2.1, "time/reload_s": 0.8}
    tenancy.have(TRAINER)                   {}
    tenancy.have(ENGINES)                   trainer.leave(), engines.enter()

Never do both have it: one enters only after the other's `leave` has returned, and after a move that failed, when nobody knows what lies
there, nobody enters any more. Nothing of a turn is durable: what is killed in the middle of one begins anew from its checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

TRAINER, ENGINES = "trainer", "engines"
SECONDS = {  # metric -> of whose move
    "time/release_s": (ENGINES, "leave"),
    "time/reload_s": (TRAINER, "enter"),
    "time/offload_s": (TRAINER, "leave"),
    "time/restore_s": (ENGINES, "enter"),
}
METRIC = {move: name for name, move in SECONDS.items()}


class Tenant(Protocol):
    """Has the memory of the devices, or has it not."""

    def leave(self) -> None:
        """Give it up: all of it is free when this returns."""
        ...

    def enter(self) -> None:
        """Take it back, and be as before."""
        ...


@dataclass
class Turn:
    """Whose turn it is: a state machine without I/O. `moves` says what is due for another's; `begins` and `ended` tell how it goes.

    moves("trainer")         [("engines", "leave"), ("trainer", "enter")]
    begins(engines, leave)   has is None: a failure from here on leaves it so, and `moves` raises
    ended(engines, leave)
    begins(trainer, enter)
    ended(trainer, enter)    has is "trainer"
    """

    has: str | None  # who has the memory
    lost: str = ""  # the move that has begun and not ended

    def moves(self, wanted: str) -> list[tuple[str, str]]:
        """(who, leave or enter), in their order; none where `wanted` has it. Raises RuntimeError after a move that failed."""
        if self.lost:
            raise RuntimeError(f"{self.lost} has failed, and nobody knows who has the devices' memory (cluster.share=swap)")
        assert self.has in (TRAINER, ENGINES) and wanted in (TRAINER, ENGINES)
        return [] if self.has == wanted else [(self.has, "leave"), (wanted, "enter")]

    def begins(self, who: str, move: str) -> None:
        """A move that `moves` named."""
        assert not self.lost and self.has == (who if move == "leave" else None), f"{who} to {move} while {self.has} has the memory"
        self.has, self.lost = None, f"{who} to {move}"

    def ended(self, who: str, move: str) -> None:
        """It has ended well."""
        assert self.lost == f"{who} to {move}", f"{self.lost} has begun"
        self.has, self.lost = (who if move == "enter" else None), ""


@dataclass
class Tenancy:
    """See the module. Without tenants nobody ever moves."""

    tenants: dict[str, Tenant] = field(default_factory=dict)
    turn: Turn = field(default_factory=lambda: Turn(ENGINES))
    clock: Callable[[], float] = time.perf_counter

    def have(self, who: str) -> dict[str, float]:
        """`who` has the memory when this returns; the seconds of each move. Raises what a tenant raises, and RuntimeError after that."""
        seconds: dict[str, float] = {}
        if not self.tenants:
            return seconds
        for tenant, move in self.turn.moves(who):
            begun = self.clock()
            self.turn.begins(tenant, move)
            moved = self.tenants[tenant]
            if move == "leave":
                moved.leave()
            else:
                moved.enter()
            self.turn.ended(tenant, move)
            seconds[METRIC[tenant, move]] = self.clock() - begun
        return seconds
