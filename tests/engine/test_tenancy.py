"""Who has the memory of a host's devices, event by event and in any order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engine.tenancy import Do, Place, Tenancy

G, S, R, L, A, C = Place.GONE, Place.STARTING, Place.RESIDENT, Place.LEAVING, Place.AWAY, Place.COMING
E = "engine 0"


def leave(t: Tenancy) -> Do | None:
    return t.leave().get(E)


def start(t: Tenancy) -> None:
    assert t.may_start(E)


# event -> by place: (place afterwards, what is due); the module's table. None: not asked there.
TABLE = {
    "leave": ((G, None), (S, Do.KILL), (L, Do.RELEASE), (L, Do.KILL), (A, None), (C, Do.KILL)),
    "enter": ((G, None), None, None, None, (C, Do.RESUME), None),
    "released": ((G, None), (S, None), (R, None), (A, None), (A, None), (C, None)),
    "started": ((G, None), (R, None), (R, None), (L, None), (A, None), (C, None)),
    "came": ((G, None), (S, None), (R, None), (L, None), (A, None), (R, None)),
    "failed": ((G, None), (S, Do.KILL), (R, None), (L, Do.KILL), (A, None), (C, Do.KILL)),
    "ended": ((G, None),) * 6,
}
EVENTS = {
    "leave": leave,
    "enter": lambda t: t.enter().get(E),
    "released": lambda t: t.released(E),
    "started": lambda t: t.started(E),
    "came": lambda t: t.came(E),
    "failed": lambda t: t.failed(E),
    "ended": lambda t: t.ended(E),
}
WAYS = {
    G: ("ended",),
    S: ("ended", "start"),
    R: (),
    L: ("leave",),
    A: ("leave", "released"),
    C: ("leave", "released", "enter"),
}


def at(place: Place) -> Tenancy:
    made = Tenancy()
    made.add(E)
    for event in WAYS[place]:
        start(made) if event == "start" else EVENTS[event](made)
    assert made.place(E) is place
    return made


@pytest.mark.parametrize("event", TABLE)
def test_every_event_in_every_place(event: str) -> None:
    for before, meant in zip(Place, TABLE[event], strict=True):
        if meant is not None:
            made = at(before)
            assert (EVENTS[event](made), made.place(E)) == meant[::-1], before


def test_nothing_starts_while_the_devices_are_the_trainers() -> None:
    made = at(A)
    made.ended(E)
    assert made.free and not made.may_start(E) and made.place(E) is G
    assert made.enter() == {} and made.may_start(E) and made.place(E) is S and not made.may_start(E)
    made.started(E)
    assert made.resident(E)


def test_the_devices_are_free_only_when_all_have_left() -> None:
    made = Tenancy()
    for name in ("a", "b", "c"):
        made.add(name)
    made.ended("c")
    assert not made.free, "it is their turn"
    assert made.leave() == {"a": Do.RELEASE, "b": Do.RELEASE}
    made.released("a")
    assert not made.free and made.failed("b") is Do.KILL and not made.free
    with pytest.raises(AssertionError, match="engines still leave"):
        made.enter()
    made.ended("b")
    assert made.free
    assert made.enter() == {"a": Do.RESUME} and not made.free


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([*EVENTS, "start"])), max_size=40))
def test_any_sequence(events: list[tuple[str, str]]) -> None:
    """Memory by what the processes were told: never a process that has memory while the devices are free, and none started then."""
    made, has = Tenancy(), {"a": True, "b": True}
    for name in has:
        made.add(name)
    for name, event in events:
        if event == "leave":
            made.leave()
        elif event == "enter":
            if made.ours or made.free:
                for back in made.enter():
                    has[back] = True
        elif event == "start":
            if made.may_start(name):
                assert made.ours and not has[name], "one process an engine"
                has[name] = True
        elif event == "released":
            if made.place(name) is L:  # it is told of what was asked
                has[name] = False
            made.released(name)
        elif event == "ended":
            has[name] = False
            made.ended(name)
        else:
            getattr(made, event)(name)
        if made.free:
            assert not any(has.values())
        assert has[name] or made.place(name) in (G, A)
