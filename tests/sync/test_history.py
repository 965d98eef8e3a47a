"""Late joiners beside a publisher that deletes."""

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from slime.sync import history as history_
from slime.sync.chain import Lease, NoWay
from slime.sync.history import collect, join, reading
from slime.sync.manifest import ANCHOR, NO_ROOT, ManifestError, root_of
from slime.sync.places import Missing
from slime.sync.store import Artefact, WeightStore
from slime.sync.store_fsspec import MemoryStore
from slime.sync.store_local import LocalStore
from tests.sync.stores import Flaky, version

MODEL_ROOT = root_of((0, 0))


def history(count: int, anchors: tuple[int, ...] = ()) -> WeightStore:
    """Versions 0 ... count - 1, and anchors of some."""
    weights = WeightStore(MemoryStore(uuid.uuid4().hex), "run")
    weights.claim(0)
    for number in range(count):
        weights.publish(*version(number))
        if number in anchors:
            add_anchor(weights, number)
    return weights


def add_anchor(weights: WeightStore, number: int) -> None:
    manifest, parts = version(number)
    weights.add(replace(manifest, kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT), parts)


def kinds(steps: object) -> list[tuple[int, str]]:
    return [(step.number, step.kind) for step in steps]  # type: ignore[attr-defined]


def test_what_a_joiner_reads_stays_until_it_is_done() -> None:
    weights = history(6)
    steps = join(weights, "host-1", (0, 5), 1000.0, None, MODEL_ROOT)
    assert kinds(steps.steps) == [(n, "delta") for n in range(6)]
    add_anchor(weights, 5)
    assert collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1) == []
    assert all(weights.parts(step) for step in steps.steps)
    weights.drop_lease("host-1")
    assert kinds(collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1)) == [(n, "delta") for n in range(6)]
    assert kinds(weights.manifests()) == [(5, ANCHOR)]
    assert kinds(join(weights, "host-1", (0, 5), 1000.0, None, MODEL_ROOT).steps) == [(5, ANCHOR)]


def test_an_abandoned_lease_ends() -> None:
    weights = history(6, anchors=(5,))
    join(weights, "host-1", (0, 4), 1000.0, None, MODEL_ROOT, ttl_s=60.0)
    assert kinds(collect(weights, list(weights.manifests()), [], 1059.0 + 300.0, keep=1)) == [(5, "delta")]
    assert len(collect(weights, list(weights.manifests()), [], 1061.0 + 300.0, keep=1)) == 5


@pytest.mark.parametrize("moment", range(14))
def test_deleting_at_any_moment_of_a_joiner(moment: int) -> None:
    """The publisher deletes before the joiner's call number `moment`: the joiner ends with steps that are all there."""
    weights, due = history(6), [True]

    def deletes(call: int, _method: str, _name: str) -> str:
        if call == moment:
            due.clear()
            add_anchor(weights, 5)
            collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1)
        return ""

    joiner = WeightStore(Flaky(weights.store, deletes), "run")
    steps = join(joiner, "late", (0, 5), 1000.0, None, MODEL_ROOT)
    assert not due, "there was such a call"
    collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1)
    assert all(weights.parts(step) for step in steps.steps) and steps.steps[-1].number == 5


def test_deleting_after_leases_were_listed_and_the_joiner_looked() -> None:
    weights = history(6, anchors=(5,))
    late, listed = weights.leases(), list(weights.manifests())
    steps = join(weights, "late", (0, 4), 1000.0, None, MODEL_ROOT)
    weights.leases = lambda: late  # type: ignore[method-assign] # what the publisher saw
    collect(weights, listed, [(0, 5)], 1000.0, keep=1)
    del weights.leases
    with pytest.raises(Missing):
        weights.parts(steps.steps[0])
    again = join(weights, "late", (0, 5), 1000.0, None, MODEL_ROOT)
    assert collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1) == [] and weights.parts(again.steps[0])


def test_without_any_way_left() -> None:
    weights = history(4)
    with pytest.raises(NoWay, match="no files lead from nothing to 0/3"):
        join(weights, "late", (0, 3), 0.0)
    assert weights.leases() == []


def test_a_damaged_lease_stops_deleting(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    weights.publish(*version(0))
    add_anchor(weights, 0)
    weights.put_lease(Lease("host-1", (), 0.0))
    lease = tmp_path / "run/leases/host-1"
    lease.write_bytes(lease.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=r"run/leases/host-1: damaged or forged .*; delete it if its holder is gone"):
        collect(weights, list(weights.manifests()), [], 0.0, keep=1)
    assert weights.manifest(Artefact(0, 0)).number == 0


def test_a_lease_holds_while_its_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is renewed by a reader that takes long."""
    weights, now = history(6), [1000.0]
    monkeypatch.setattr(history_.time, "time", lambda: now[0])
    with reading(weights, "host-1", (0, 5), None, MODEL_ROOT) as steps:
        add_anchor(weights, 5)
        for n, (step, parts) in enumerate(steps):
            assert step.number == n and len(parts) == 2
            collect(weights, list(weights.manifests()), [(0, 5)], now[0], keep=1)
            now[0] += 3000.0
    assert n == 5 and weights.leases() == []
    assert len(collect(weights, list(weights.manifests()), [(0, 5)], now[0], keep=1)) == 6


def test_what_a_lease_s_holder_writes_is_not_swept() -> None:
    """The parts of a fold come before its manifest, at a version that the lease names."""
    weights = history(6, anchors=(5,))
    with reading(weights, "host-1", (0, 1), None, MODEL_ROOT):
        weights.store.put("run/0/v00000001/fold.-1.-1/part-0000.0123456789abcdef", b"of a fold")
        weights.store.put("run/0/v00000003/part-0009.0123456789abcdef", b"of a killed publisher")
        assert kinds(collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1)) == [(n, "delta") for n in range(2, 6)]
        assert weights.store.exists("run/0/v00000001/fold.-1.-1/part-0000.0123456789abcdef")
        assert weights.store.exists("run/0/v00000003/part-0009.0123456789abcdef")
    collect(weights, list(weights.manifests()), [(0, 5)], 1000.0, keep=1)
    assert {name for name in weights.store.list("run") if "part-" in name} == {
        f"run/0/v00000005/anchor/{p.name}" for p in version(5)[0].parts
    }


def test_a_store_that_may_only_be_read(caplog: pytest.LogCaptureFixture) -> None:
    weights = history(3)

    class ReadOnly(Flaky):
        def put(self, name: str, data: bytes) -> None:
            raise PermissionError(f"{name}: access denied")

    reader = WeightStore(ReadOnly(weights.store, lambda *_: ""), "run")
    with reading(reader, "host-1", (0, 2), None, MODEL_ROOT) as steps:
        assert [step.number for step, _ in steps] == [0, 1, 2]
    assert "no lease (run/leases/host-1: access denied): if the run of these files goes on" in caplog.text


def test_a_damaged_version_leads_nowhere_and_hides_no_other(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    for number in range(3):
        weights.publish(*version(number))
    (tmp_path / "run/0/v00000002/manifest.json").write_text("{")
    assert kinds(join(weights, "host-1", (0, 1), 0.0, None, MODEL_ROOT).steps) == [(0, "delta"), (1, "delta")]
    with pytest.raises(NoWay):
        join(weights, "host-1", (0, 2), 0.0, None, MODEL_ROOT)


def test_leases_are_not_listed_where_nothing_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = history(3)
    monkeypatch.delattr(WeightStore, "leases")
    assert collect(weights, list(weights.manifests()), [(0, 2)], 0.0, keep=1) == []
