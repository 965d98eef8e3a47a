"""A store of weights whose files were damaged, replayed or forged: each is noticed and named. docs/faults.md: 2, 4, 18."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slime.sync.manifest import ManifestError, sign
from slime.sync.places import Missing
from slime.sync.store import Artefact, WeightStore
from slime.sync.store_local import LocalStore
from tests.sync.stores import KEY, version


@pytest.fixture
def published(tmp_path: Path) -> WeightStore:
    weights = WeightStore(LocalStore(tmp_path), "run", KEY)
    weights.claim(0)
    for number in range(2):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)
    return weights


def read_all(weights: WeightStore) -> None:
    found = WeightStore(weights.store, "run", KEY).latest()
    assert found is not None
    for number in range(2):
        weights.parts(weights.manifest(Artefact(0, number)))


@pytest.mark.thorough
def test_every_cut_and_flip_is_noticed(published: WeightStore, tmp_path: Path) -> None:
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) == 7
    for path in files:
        whole = path.read_bytes()
        for damaged in (
            whole[:-1],
            whole[: len(whole) // 2],
            b"",
            whole + b"\0",
            *(flipped(whole, bit) for bit in range(0, 8 * len(whole), 61)),
        ):
            path.write_bytes(damaged)
            with pytest.raises((ManifestError, ValueError)) as raised:
                read_all(published)
            assert path.name in str(raised.value), f"{raised.value}: names the file"
        path.write_bytes(whole)
        read_all(published)
        path.unlink()
        with pytest.raises((Missing, AssertionError)):
            read_all(published)
        path.write_bytes(whole)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_manifest_of_another_place_is_no_manifest(published: WeightStore, tmp_path: Path) -> None:
    """A replay: a genuine, signed file of an older version, or of another run, where a newer one should be."""
    newer = tmp_path / "run/0/v00000001/manifest.json"
    genuine = newer.read_bytes()
    shutil.copy(tmp_path / "run/0/v00000000/manifest.json", newer)
    with pytest.raises(ManifestError, match="it is the delta of run/0/0: a replay"):
        published.manifest(Artefact(0, 1))
    other, _ = version(1, run_id="other")
    newer.write_text(sign(other, KEY).to_json())
    with pytest.raises(ManifestError, match="it is the delta of other/0/1: a replay"):
        published.manifest(Artefact(0, 1))
    newer.write_bytes(genuine)
    for forged, says in (
        (sign(version(1)[0], b"somebody else's key"), "is not this key's"),
        (version(1)[0], "not signed"),
        (replace(sign(version(1)[0], KEY), fingerprints=(9, 9)), "altered or forged"),
    ):
        newer.write_text(forged.to_json())
        with pytest.raises(ManifestError, match=says):
            published.manifest(Artefact(0, 1))


def test_an_older_pointer_is_a_replay(published: WeightStore, tmp_path: Path) -> None:
    pointer = tmp_path / "run/latest"
    older = pointer.read_bytes()
    manifest, parts = version(2)
    published.publish(sign(manifest, KEY), parts)
    assert published.latest() is not None
    pointer.write_bytes(older)
    with pytest.raises(ManifestError, match=r"run/latest: leads to 0/1, but \(0, 2\) was there: a replay"):
        published.latest()


def test_a_pointer_of_another_run_or_key(published: WeightStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run/latest", tmp_path / "other/latest")
    for weights in (
        WeightStore(published.store, "other", KEY),
        WeightStore(published.store, "run", KEY + b"x"),
        WeightStore(published.store, "run"),
    ):
        with pytest.raises(ManifestError, match="damaged or forged"):
            weights.latest()
        with pytest.raises(ManifestError, match="damaged or forged"):
            weights.claim(1)


def test_lengths_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    """A manifest that declares a huge part allocates nothing; a part larger than declared is not read."""
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    weights.publish(*version(0))
    manifest = weights.manifest(Artefact(0, 0))
    huge = replace(manifest, parts=tuple(replace(part, nbytes=1 << 41) for part in manifest.parts))
    with pytest.raises(ManifestError, match=r"has \d+ bytes instead of 2199023255552: it is cut"):
        weights.part(huge, 0)
    path = tmp_path / f"run/0/v00000000/{manifest.parts[0].name}"
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="has 1099511627776 bytes, at most"):
        weights.part(manifest, 0)


def test_parts_that_are_not_the_manifest_s_are_not_published(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    manifest, parts = version(0)
    for wrong, says in (([parts[1], parts[0]], "altered|cut"), (parts[:1], "1 parts given, the manifest names 2")):
        with pytest.raises(ManifestError, match=says):
            weights.publish(manifest, wrong)
    assert weights.latest() is None and weights.store.list("run/0") == []
