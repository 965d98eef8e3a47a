"""The router, without a network."""

import pytest

from slime.engine import routing
from slime.engine.errors import EngineError
from slime.engine.routing import SLACK, Router, State


def router(count: int = 3) -> Router:
    made = Router([f"engine {i}" for i in range(count)])
    for i in range(count):
        made.ready(i)
    return made


def test_engines_begin_fenced_and_the_error_says_why() -> None:
    made = Router(["engine 0", "engine 1"])
    made.dead(1, "it does not accept connections")
    with pytest.raises(EngineError, match="engine 0 is fenced: its weights are not known yet; engine 1 is dead: it does not accept"):
        made.acquire(1)


def test_requests_without_a_session_go_to_the_least_loaded() -> None:
    made = router()
    assert [made.acquire() for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    made.release(1)
    assert made.acquire() == 1


def test_a_session_stays_with_its_engine() -> None:
    made = router()
    first = {session: made.acquire(session) for session in range(30)}
    assert set(first.values()) == {0, 1, 2}
    for _ in range(3):
        assert {session: made.acquire(session) for session in range(30)} == first


def test_a_session_leaves_an_engine_with_much_more_to_do() -> None:
    made = router(2)
    at = made.acquire(7)
    for _ in range(SLACK):
        assert made.acquire(7) == at
    assert made.slots[at].load == SLACK + 1
    assert made.acquire(7) == 1 - at, "the other one is idle"
    assert made.acquire(7) == 1 - at, "and has the prompt now"


def test_only_ready_engines_get_traffic() -> None:
    made = router()
    at = made.acquire(7)
    made.fence(at, "it holds weights r/0/1, expected r/0/2")
    others = {made.acquire(7) for _ in range(5)} | {made.acquire() for _ in range(5)}
    assert at not in others
    made.ready(at)
    assert at in {made.acquire() for _ in range(10)}


def test_a_dead_engine_is_not_merely_fenced() -> None:
    made = router(2)
    made.dead(0, "gone")
    made.fence(0, "stale")
    assert made.slots[0].state is State.DEAD
    made.ready(0)
    assert made.slots[0].state is State.READY


def test_an_engine_that_is_back_is_fenced_until_it_is_ready() -> None:
    made = router(2)
    made.back(0, life=0)
    assert made.slots[0].state is State.READY, "it was never out"
    made.dead(0, "no answer for 60 s")
    made.back(0, life=0)
    assert made.slots[0].state is State.FENCED and made.open
    made.ready(0)
    made.back(0, life=1)
    assert made.slots[0].state is State.FENCED and made.slots[0].life == 1, "what it holds is another life's"
    made.dead(1, "its process ended")
    assert not made.open and made.said() == (
        "engine 0 is fenced: it is back, and what it holds is not known yet; engine 1 is dead: its process ended"
    )


def test_loads_return_to_zero_and_never_pass_it() -> None:
    made = router(2)
    for engine in [made.acquire(s) for s in range(10)]:
        made.release(engine)
    assert [slot.load for slot in made.slots] == [0, 0]
    with pytest.raises(AssertionError, match="engine 0 has no request"):
        made.release(0)


def test_old_sessions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "SESSIONS", 10)
    made = router()
    for session in range(100):
        made.release(made.acquire(session))
    assert list(made._sessions) == list(range(90, 100))


def test_a_full_engine_gets_nothing_and_its_sessions_leave() -> None:
    made = router(2)
    made.slots[0].runs = made.slots[1].runs = 8
    at = made.acquire(7)
    assert [made.acquire(7) for _ in range(8)] == [at] * 8, "as many as it runs, and one that waits there"
    assert made.acquire(7) == 1 - at, "which is idle"
    assert {made.acquire() for _ in range(8)} == {1 - at} and made.acquire() is None and made.open
    made.release(at)
    assert made.acquire(7) == at and made.acquire(7) is None


def test_an_engine_that_does_not_say_how_much_it_runs_is_never_full() -> None:
    made = router(1)
    assert [made.acquire() for _ in range(5000)] == [0] * 5000
