"""The health of an engine, event by event and in any order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engine.health import Health, Kind, State, Trouble, Turn

TIMEOUT_S, MOST = 60.0, 3
H, S, D, R, L, X = State.HEALTHY, State.SUSPECT, State.DEAD, State.RESTARTING, State.STALE, State.RETIRED
NOW = 1000.0


def trouble(health: Health, kind: Kind, life: int | None = None) -> Trouble:
    return Trouble("e", kind, f"it was {kind}", health.life if life is None else life)


EVENTS = {
    "answered": lambda h, now: h.answered(now),
    "missed": lambda h, now: h.missed(now, "no answer"),
    "missed for long": lambda h, now: h.missed(now + TIMEOUT_S, "no answer"),
    "at work": lambda h, now: h.at_work(now),
    "ended": lambda h, now: h.ended("signal 9"),
    "lost": lambda h, now: h.reported(trouble(h, Kind.LOST)),
    "late": lambda h, now: h.reported(trouble(h, Kind.LATE)),
    "garbage": lambda h, now: h.reported(trouble(h, Kind.GARBAGE)),
    "reported stale": lambda h, now: h.reported(trouble(h, Kind.STALE)),
    "of an earlier life": lambda h, now: h.reported(trouble(h, Kind.GARBAGE, h.life - 1)),
    "stale": lambda h, now: h.stale("it is fenced"),
    "released": lambda h, now: h.released(),
    "restarting": lambda h, now: h.restarting(),
    "up": lambda h, now: h.up(now),
    "caught up": lambda h, now: h.caught_up(now),
    "failed": lambda h, now: h.failed("it did not start"),
    "unfit": lambda h, now: h.unfit("it cannot be followed"),
    "published": lambda h, now: h.published(),
}
# What an event leads to from HEALTHY, SUSPECT, DEAD, RESTARTING, STALE, RETIRED; of an engine that slime started.
TABLE = {
    "answered": (H, H, D, R, L, X),
    "missed": (S, S, D, R, L, X),
    "missed for long": (D, D, D, R, D, X),
    "at work": (H, S, D, R, L, X),
    "ended": (D, D, D, D, D, X),
    "lost": (S, S, D, R, L, X),
    "late": (D, D, D, R, L, X),
    "garbage": (D, D, D, R, L, X),
    "reported stale": (L, L, D, R, L, X),
    "of an earlier life": (H, S, D, R, L, X),
    "stale": (L, L, D, R, L, X),
    "released": (L, L, D, R, L, X),
    "restarting": (H, S, R, R, L, X),
    "up": (H, S, D, L, L, X),
    "caught up": (H, S, D, R, H, X),
    "failed": (H, S, D, D, D, X),
    "unfit": (X, X, X, X, X, X),
    "published": (H, S, D, R, L, X),
}
THEIRS = {("answered", D): L, ("restarting", D): D}  # where a server of the user's differs
WAYS = {H: (), S: ("missed",), D: ("ended",), R: ("ended", "restarting"), L: ("stale",), X: ("unfit",)}


def health(ours: bool = True, turns: list[Turn] | None = None, most: int = MOST) -> Health:
    """HEALTHY for the first time."""
    made = Health("e", NOW, TIMEOUT_S, most, ours, [].append if turns is None else turns.append)
    made.caught_up(NOW)
    return made


def at(state: State, ours: bool = True) -> Health:
    made = health(ours)
    for event in WAYS[state]:
        EVENTS[event](made, NOW)
    assert made.state is state
    return made


@pytest.mark.parametrize("event", TABLE)
def test_every_event_in_every_state(event: str) -> None:
    for ours in (True, False):
        for before, after in zip(State, TABLE[event], strict=True):
            if before is R and not ours:
                continue
            made = at(before, ours)
            EVENTS[event](made, NOW)
            assert made.state is (after if ours else THEIRS.get((event, before), after)), (before, ours)


def test_the_table_is_of_all_events() -> None:
    assert TABLE.keys() == EVENTS.keys() and [*State] == [H, S, D, R, L, X]


def test_a_stopped_engine_as_the_module_tells_it() -> None:
    turns: list[Turn] = []
    made = health(turns=turns)
    made.missed(NOW + 2, "no answer in 5 s")
    assert not made.routed
    made.missed(NOW + 62, "no answer in 5 s")
    made.restarting()
    made.up(NOW + 80)
    made.caught_up(NOW + 85)
    assert [turn.state for turn in turns] == [H, S, D, R, L, H] and made.life == 1 and made.routed
    assert turns[2].reason == "no answer for 60 s (rollout.health_timeout_s): no answer in 5 s"
    made.reported(trouble(made, Kind.GARBAGE, life=0))
    assert made.routed, "what came of the process that is gone"


def test_only_silence_is_counted_and_not_an_update() -> None:
    made = health()
    made.missed(NOW + 59, "no answer")
    made.answered(NOW + 60)
    made.missed(NOW + 119, "no answer")
    assert made.state is S
    made.at_work(NOW + 300)
    made.missed(NOW + 301, "no answer")
    assert made.state is S


def test_the_number_of_restarts_counts_between_two_versions() -> None:
    made = health()
    for _ in range(3):
        for _ in range(MOST):
            made.ended("signal 9")
            made.restarting()
            made.up(NOW)
            made.caught_up(NOW)
        assert made.state is H
        made.published()
    for _ in range(MOST):
        made.ended("signal 9")
        made.restarting()
        made.failed("no port")
    made.restarting()
    assert made.state is X
    assert made.reason == "it was brought back 3 times since the last published weights (rollout.max_restarts); the last time: no port"


@pytest.mark.parametrize("most", [0, 2])
def test_one_that_is_stale_again_and_again_is_retired(most: int) -> None:
    made = health(ours=False, most=most)
    for _ in range(most):
        made.stale("it is fenced")
        made.caught_up(NOW)
    made.stale("it is fenced")
    assert made.state is X


@settings(max_examples=75, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.sampled_from([*EVENTS]), st.floats(0, 40)), max_size=60))
def test_any_sequence(ours: bool, events: list[tuple[str, float]]) -> None:
    """It gets no requests before it is proven after what may have changed its weights; retired is for ever; restarts are counted."""
    turns: list[Turn] = []
    made, now, proven, since = health(ours, turns), NOW, True, 0
    for event, seconds in events:
        before, count, life = made.state, len(turns), made.life
        now += seconds
        EVENTS[event](made, now)
        if made.state in (D, R, L, X):
            proven = False
        if event == "caught up" and before is L:
            proven = True
            assert made.life == life + 1
        else:
            assert made.life == life
        assert made.routed == (made.state is H) and (not made.routed or proven)
        assert before is not X or made.state is X
        came_down = made.state in (R, L) and before in (H, S, D) and made.state is not before and event != "released"
        since = 0 if event == "published" else since + came_down
        assert since <= MOST
        assert ours or made.state is not R
        assert (made.state is not before) == (len(turns) > count) and turns[-1].state is made.state
