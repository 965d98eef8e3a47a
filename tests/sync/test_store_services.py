"""Stores of weights whose service is not well: busy, answers that are lost, listings and files that come late. docs/faults.md: 14."""

import re
import uuid
from pathlib import Path

import pytest

from slime.sync.manifest import sign
from slime.sync.places import Busy, Missing, Patient, Store
from slime.sync.store import Artefact, WeightStore
from slime.sync.store_fsspec import MemoryStore
from slime.sync.store_local import LocalStore
from tests.sync.stores import KEY, Flaky, version


def patient(store: Store, tries: int = 8) -> tuple[Patient, list[float]]:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Patient(store, 60.0, tries, lambda: now[0], sleep), now


@pytest.mark.parametrize("fate", ["503", "lost"])
@pytest.mark.parametrize("phase", range(3))
def test_a_busy_service_is_asked_again(fate: str, phase: int) -> None:
    """Two of three calls fail, those whose answer is lost after they were carried out."""
    store, _ = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda call, _method, _name: fate if call % 3 != phase else ""), tries=40)
    weights = WeightStore(store, "run", KEY)
    weights.claim(0)
    for number in range(3):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)
    found = weights.latest()
    assert found is not None and found.number == 2 and len(list(weights.manifests())) == 3


def test_a_service_that_stays_busy() -> None:
    store, now = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda *_: "503"), tries=1000)
    with pytest.raises(Busy, match=r"cannot write a: a: 503 Slow Down \(\d+ tries, at most 60 s\)"):
        store.put("a", b"")
    assert 50 < now[0] <= 60
    store, now = patient(Flaky(MemoryStore(uuid.uuid4().hex), lambda *_: "503"))
    with pytest.raises(Busy, match=r"\(8 tries"):
        store.get("a", 1)


def test_a_manifest_that_does_not_show_at_once() -> None:
    place = MemoryStore(uuid.uuid4().hex)
    writer = WeightStore(place, "run")
    writer.claim(0)
    writer.publish(*version(0))
    missing = [0]

    def window(_call: int, _method: str, name: str) -> str:
        missing[0] += name.endswith("manifest.json")
        return "404" if name.endswith("manifest.json") and missing[0] < 4 else ""

    store, now = patient(Flaky(place, window))
    reader = WeightStore(store, "run")
    assert reader.latest() is not None
    assert reader.manifest(Artefact(0, 0)).label == "run/0/0" and now[0] > 0
    with pytest.raises(Missing, match="v00000007"):
        reader.manifest(Artefact(0, 7))


def test_a_listing_is_never_believed() -> None:
    """It lacks what is new and shows what is gone."""
    place = MemoryStore(uuid.uuid4().hex)
    writer = WeightStore(place, "run")
    writer.claim(0)
    for number in range(2):
        writer.publish(*version(number))

    class Stale(Flaky):
        def list(self, prefix: str) -> list[str]:
            return ["run/0/v00000000/manifest.json", "run/0/v00000005/manifest.json"]

    reader = WeightStore(Stale(place, lambda *_: ""), "run")
    found = reader.latest()
    assert found is not None and reader.manifest(Artefact(found.epoch, found.number)).number == 1
    assert [m.number for m in reader.manifests()] == [0]


def test_a_manifest_before_its_parts_is_noticed(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    manifest, parts = version(0)
    weights.store.put("run/0/v00000000/manifest.json", manifest.to_json().encode())
    weights.store.put(f"run/0/v00000000/{manifest.parts[0].name}", parts[0])
    with pytest.raises(Missing, match=re.escape(manifest.parts[1].name)):
        weights.parts(weights.manifest(Artefact(0, 0)))
