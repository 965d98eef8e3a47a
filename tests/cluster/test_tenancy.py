"""Whose turn it is with the memory of shared devices: never both's, nobody's after a failure."""

from dataclasses import dataclass, field

import pytest

from slime.cluster.tenancy import ENGINES, METRIC, TRAINER, Tenancy, Turn


@dataclass
class Memory:
    """A device's, which holds one tenant."""

    inside: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


@dataclass
class Guest:
    name: str
    memory: Memory
    fails: str = ""

    def leave(self) -> None:
        self._go("leave")
        self.memory.inside.remove(self.name)

    def enter(self) -> None:
        self._go("enter")
        assert not self.memory.inside, "both at once"
        self.memory.inside.append(self.name)

    def _go(self, move: str) -> None:
        self.memory.told.append(f"{self.name} {move}")
        if move == self.fails:
            raise TimeoutError(f"{self.name} to {move}: nothing after 1 s")


def shared(**fails: str) -> tuple[Tenancy, Memory]:
    """The engines have it; a second passes with every look at the clock."""
    memory, now = Memory([ENGINES]), iter(range(1000))
    return Tenancy({name: Guest(name, memory, fails.get(name, "")) for name in (TRAINER, ENGINES)}, clock=lambda: next(now)), memory


def test_one_leaves_before_the_other_enters() -> None:
    tenancy, memory = shared()
    assert tenancy.have(ENGINES) == {} and memory.told == []
    assert tenancy.have(TRAINER) == {"time/release_s": 1, "time/reload_s": 1}
    assert tenancy.have(TRAINER) == {} and memory.inside == [TRAINER]
    assert tenancy.have(ENGINES) == {"time/offload_s": 1, "time/restore_s": 1}
    assert memory.told == ["engines leave", "trainer enter", "trainer leave", "engines enter"] and memory.inside == [ENGINES]


@pytest.mark.parametrize(
    ("wanted", "fails", "told"),
    [
        (TRAINER, {ENGINES: "leave"}, ["engines leave"]),
        (TRAINER, {TRAINER: "enter"}, ["engines leave", "trainer enter"]),
    ],
)
def test_after_a_move_that_failed_nobody_enters(wanted: str, fails: dict[str, str], told: list[str]) -> None:
    tenancy, memory = shared(**fails)
    with pytest.raises(TimeoutError):
        tenancy.have(wanted)
    failed = told[-1].replace(" ", " to ")
    for who in (ENGINES, TRAINER):
        with pytest.raises(RuntimeError, match=rf"^{failed} has failed, and nobody knows who has the devices' memory"):
            tenancy.have(who)
    assert memory.told == told


def test_where_nothing_is_shared_nobody_moves() -> None:
    assert Tenancy().have(TRAINER) == {} and Tenancy().have(ENGINES) == {}


def test_a_turn_refuses_moves_that_it_did_not_name() -> None:
    turn = Turn(TRAINER)
    assert turn.moves(ENGINES) == [(TRAINER, "leave"), (ENGINES, "enter")] and turn.moves(TRAINER) == []
    with pytest.raises(AssertionError, match="engines to enter while trainer has the memory"):
        turn.begins(ENGINES, "enter")
    turn.begins(TRAINER, "leave")
    with pytest.raises(AssertionError):
        turn.ended(ENGINES, "enter")
    turn.ended(TRAINER, "leave")
    assert turn.has is None and not turn.lost
    with pytest.raises(AssertionError):
        turn.begins(TRAINER, "leave")


def test_every_move_has_a_metric() -> None:
    assert set(METRIC) == {(who, move) for who in (TRAINER, ENGINES) for move in ("leave", "enter")}
