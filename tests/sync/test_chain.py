"""Plans by bytes, when anchors are due, what may be deleted while others still read."""

import random
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync import chain
from slime.sync.chain import Lease, NoWay, plan
from slime.sync.manifest import ANCHOR, FOLD, MODEL_DIRECTORY, NO_ROOT, Manifest, PartRef, root_of

MODEL_ROOT = root_of((0,))


def part(nbytes: int) -> tuple[PartRef, ...]:
    return (PartRef("part-0000.0123456789abcdef", nbytes, "0" * 64),)


def delta(number: int, nbytes: int = 10, base: int | None = None, **values: Any) -> Manifest:
    """Version `number` from `base`, by default the one before; the fingerprint of version n is n + 1."""
    base = number - 1 if base is None else base
    made: dict[str, Any] = {
        "run_id": "run",
        "epoch": 0,
        "number": number,
        "parent_epoch": 0 if base >= 0 else -1,
        "parent_number": base,
        "kind": "delta" if base == number - 1 else FOLD,
        "signature": "5" * 32,
        "codec": "steps",
        "part_bytes": 1,
        "parts": part(nbytes),
        "fingerprints": (number + 1,),
        "parent_root": root_of((base + 1,)),
        "changed": (1,),
    }
    return Manifest(**made | values)


def anchor(number: int, nbytes: int = 100) -> Manifest:
    return replace(delta(number, nbytes), kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT)


def held(number: int) -> chain.Node:
    return (0, number), root_of((number + 1,))


def said(found: chain.Plan) -> str:
    return ", ".join(f"{s.kind} {s.parent_number}->{s.number}" for s in found.steps)


DELTAS = [delta(n) for n in range(8)]


@pytest.mark.parametrize(
    ("manifests", "target", "at", "model_root", "expected"),
    [
        (DELTAS, 3, held(1), "", "delta 1->2, delta 2->3"),
        (DELTAS, 3, held(3), "", ""),
        (DELTAS, 1, None, MODEL_ROOT, "delta -1->0, delta 0->1"),
        ([*DELTAS, delta(5, 25, base=1)], 6, held(1), "", "fold 1->5, delta 5->6"),
        ([*DELTAS, delta(5, 45, base=1)], 6, held(1), "", "delta 1->2, delta 2->3, delta 3->4, delta 4->5, delta 5->6"),
        ([*DELTAS, anchor(4, 30)], 6, None, MODEL_ROOT, "anchor -1->4, delta 4->5, delta 5->6"),
        ([*DELTAS, anchor(4, 60)], 5, None, MODEL_ROOT, "delta -1->0, delta 0->1, delta 1->2, delta 2->3, delta 3->4, delta 4->5"),
        ([*DELTAS, anchor(4, 60)], 5, None, "", "anchor -1->4, delta 4->5"),
        ([*DELTAS, anchor(6, 5)], 7, held(2), "", "anchor -1->6, delta 6->7"),
        ([*DELTAS, anchor(3)], 3, ((0, 3), "f" * 32), "", "anchor -1->3"),
        (DELTAS, -1, ((-1, -1), MODEL_ROOT), MODEL_ROOT, ""),
        ([DELTAS[0], *DELTAS[4:], anchor(5)], 7, held(2), "", "anchor -1->5, delta 5->6, delta 6->7"),
        ([delta(3, 25, base=-1), delta(6, 20, base=3), *DELTAS], 6, None, MODEL_ROOT, "fold -1->3, fold 3->6"),
    ],
)
def test_the_cheapest_way(manifests: list[Manifest], target: int, at: chain.Node | None, model_root: str, expected: str) -> None:
    for order in (manifests, manifests[::-1]):
        assert said(plan(order, (0, target) if target >= 0 else MODEL_DIRECTORY, at, model_root)) == expected


def test_no_way() -> None:
    for manifests, target, at, model_root in (
        (DELTAS, 9, held(0), MODEL_ROOT),
        (DELTAS, 3, None, ""),
        ([*DELTAS[:2], *DELTAS[3:]], 4, held(0), ""),
        (DELTAS, 3, ((0, 1), "f" * 32), ""),
        (DELTAS, 3, None, "f" * 32),
        (DELTAS, 1, held(3), ""),
        (DELTAS, 3, ((0, 3), "f" * 32), ""),
        ([], 0, None, MODEL_ROOT),
        ([], 3, held(3), ""),
    ):
        with pytest.raises(NoWay, match=rf"no files lead from .* to 0/{target}: take a newer version, or an anchor"):
            plan(manifests, (0, target), at, model_root)


def test_a_version_of_another_past_is_not_built_upon() -> None:
    """A resumed trainer went on from 0/2: the versions 0/3 and 0/4 of before lead nowhere."""
    resumed = [
        replace(delta(3), epoch=1, fingerprints=(33,)),
        replace(delta(4), epoch=1, parent_epoch=1, parent_root=root_of((33,)), fingerprints=(34,)),
    ]
    every = [*DELTAS[:5], *resumed]
    found = plan(every, (1, 4), held(0))
    assert [s.label for s in found.steps] == ["run/0/1", "run/0/2", "run/1/3", "run/1/4"]
    with pytest.raises(NoWay):
        plan(every, (1, 4), held(4))


def cheapest_by_hand(manifests: list[Manifest], target: int, at: int) -> int | None:
    """Bytes, by trying every way."""
    if at == target:
        return 0
    costs = []
    for manifest in manifests:
        if manifest.kind != ANCHOR and manifest.parent_number == at and manifest.number <= target:
            rest = cheapest_by_hand(manifests, target, manifest.number)
            costs += [] if rest is None else [manifest.nbytes + rest]
    return min(costs, default=None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 5), st.integers(1, 4), st.integers(0, 50)), max_size=14),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 90)), max_size=2),
)
def test_no_way_is_cheaper(steps: list[tuple[int, int, int]], anchors: list[tuple[int, int]]) -> None:
    manifests = [delta(base + length, nbytes, base=base) for base, length, nbytes in steps]
    whole = [anchor(number, nbytes) for number, nbytes in anchors]
    ways = [
        cheapest_by_hand(manifests, 6, 0),
        *(None if (rest := cheapest_by_hand(manifests, 6, a.number)) is None else a.nbytes + rest for a in whole),
    ]
    costs = [cost for cost in ways if cost is not None]
    try:
        found = plan([*manifests, *whole], (0, 6), held(0))
    except NoWay:
        assert not costs
        return
    assert found.nbytes == min(costs)
    at = held(0)
    for step in found.steps:
        assert step.kind == ANCHOR or chain.source_of(step) == at
        at = chain.target_of(step)
    assert at == held(6)


def test_when_an_anchor_is_due() -> None:
    assert not chain.anchor_due(DELTAS[:3], (0, 2), every=4, anchor_bytes=1000)
    assert chain.anchor_due(DELTAS[:4], (0, 3), every=4, anchor_bytes=1000)
    assert not chain.anchor_due([*DELTAS[:4], anchor(3)], (0, 3), every=4, anchor_bytes=1000)
    assert not chain.anchor_due([*DELTAS[:7], anchor(3)], (0, 6), every=4, anchor_bytes=1000)
    assert chain.anchor_due([*DELTAS, anchor(3)], (0, 7), every=4, anchor_bytes=1000)
    assert not chain.anchor_due(DELTAS[:3], (0, 2), every=99, anchor_bytes=60) and chain.anchor_due(
        DELTAS[:3], (0, 2), every=99, anchor_bytes=59
    )


def test_steps_that_do_not_follow_one_another() -> None:
    chain.consecutive(DELTAS)
    with pytest.raises(ValueError, match=r"run/0/3 begins from run/0/2 .*, not from run/0/1"):
        chain.consecutive([DELTAS[1], DELTAS[3]])


# --- retention --------------------------------------------------------------------------------------------------------

EVERY = [*(delta(n) for n in range(20)), *(anchor(n) for n in (4, 9, 14)), delta(11, base=7), delta(13, base=9)]


def numbers(manifests: list[Manifest]) -> list[tuple[int, str]]:
    return [(m.number, m.kind) for m in manifests]


def test_what_may_be_deleted() -> None:
    gone = chain.deletable(EVERY, [(0, 19), (0, 18)], [], 0.0, keep=8)
    assert numbers(gone) == [*((n, "delta") for n in range(4)), (4, "anchor"), *((n, "delta") for n in range(4, 10)), (11, "fold")]
    kept = [m for m in EVERY if m not in gone]
    assert plan(kept, (0, 19)).steps[0].label == "run/0/14" and plan(kept, (0, 12)).steps[0].number == 9


def test_an_engine_that_lags_keeps_what_it_needs() -> None:
    gone = chain.deletable(EVERY, [(0, 19), (0, 6)], [], 0.0, keep=3)
    kept = [m for m in EVERY if m not in gone]
    assert plan(kept, (0, 19), held(6)).steps and min(m.number for m in kept) == 4


def test_without_an_anchor_everything_stays() -> None:
    assert chain.deletable(DELTAS, [(0, 7)], [], 0.0, keep=1) == []
    assert chain.deletable([*DELTAS, anchor(7)], [(0, 6)], [], 0.0, keep=1) == []
    assert chain.deletable([], [], [], 0.0, keep=1) == []
    assert numbers(chain.deletable([*DELTAS, anchor(7)], [], [], 0.0, keep=1)) == [(n, "delta") for n in range(8)]


@pytest.mark.parametrize(("ahead_s", "stays"), [(0, True), (59, True), (359, True), (361, False), (-600, True)])
def test_a_lease_keeps_files_whatever_the_clocks_say(ahead_s: float, stays: bool) -> None:
    """The deleter's clock runs ahead of the holder's; 60 s of lease, 300 s of margin."""
    joiner = plan(EVERY, (0, 3), None, MODEL_ROOT)
    taken = chain.lease("host-1", joiner, now_s=1000.0, ttl_s=60.0)
    gone = chain.deletable(EVERY, [(0, 19)], [taken], 1000.0 + ahead_s, keep=1, skew_s=300.0)
    assert all(step not in gone for step in joiner.steps) == stays


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.lists(st.integers(0, 19), max_size=3))
def test_nobody_is_cut_off(seed: int, keep: int, engines: list[int]) -> None:
    """Whatever is deleted, in whatever order it has got to: from every engine, from nothing and from every lease a way leads on."""
    drawn = random.Random(seed)
    manifests = [
        *(delta(n, drawn.randint(1, 50)) for n in range(20)),
        *(anchor(n, drawn.randint(20, 300)) for n in drawn.sample(range(20), 3)),
    ]
    manifests += [delta(b + drawn.randint(2, 5), drawn.randint(1, 90), base=b) for b in drawn.sample(range(-1, 14), 3)]
    leased = plan(manifests, (0, drawn.randint(0, 19)), None, MODEL_ROOT)
    gone = chain.deletable(manifests, [(0, e) for e in engines], [chain.lease("x", leased, 0.0, 60.0)], 30.0, keep)
    drawn.shuffle(gone)
    left = list(manifests)
    for deleted in [None, *gone]:
        left = [m for m in left if m != deleted]
        for engine in engines:
            plan(left, (0, 19), held(engine))
        plan(left, (0, 19), None, MODEL_ROOT)
        assert all(step in left for step in leased.steps)
    newest = sorted({m.order for m in manifests})[-keep:]
    for order in newest:
        plan(left, order, None, MODEL_ROOT)


def test_a_late_joiner_and_the_deleter_at_once() -> None:
    """Each does its steps in order, interleaved in every way. The joiner plans, takes a lease, then reads; what was deleted before the
    lease showed sends it to plan again. It ends with the newest version, and needs no third plan."""
    joins, deletes = ("plan", "lease", "read"), ("look", "delete", "look", "delete")
    for moments in set(permutations([0] * len(joins) + [1] * len(deletes))):
        left, leases, planned = list(EVERY), list[Lease](), chain.Plan(())
        looked: list[Manifest] = []
        mine, theirs, arrived = iter(joins), iter(deletes), False
        for who in moments:
            match next(mine) if who == 0 else next(theirs):
                case "plan":
                    planned = plan(left, (0, 19), held(2))
                case "lease":
                    leases = [chain.lease("late", planned, 0.0, 60.0)]
                case "read":
                    arrived = all(step in left for step in planned.steps)
                case "look":
                    looked = chain.deletable(left, [(0, 19)], leases, 1.0, keep=2)
                case "delete":
                    left = [m for m in left if m not in looked]
        if not arrived:
            planned = plan(left, (0, 19), held(2))
            leases = [chain.lease("late", planned, 0.0, 60.0)]
            again = chain.deletable(left, [(0, 19)], leases, 1.0, keep=2)
            assert all(step in left and step not in again for step in planned.steps)
        assert planned.steps[-1].number == 19
