"""A store of weights after loss of power, a kill, a full disk: the newest version is whole, or the one before. docs/faults.md: 9, 15."""

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync.manifest import ManifestError, sign
from slime.sync.places import Missing
from slime.sync.store import Artefact, WeightStore
from slime.sync.store_local import Files, LocalStore
from tests.sync.stores import KEY, MODEL, FullDisk, PowerLoss, VolatileFiles, version

ROOT = Path("/weights")


def publish_two(files: Files, key: bytes | None = KEY) -> None:
    weights = WeightStore(LocalStore(ROOT, files), "run", key)
    weights._each = lambda call, count: [call(i) for i in range(count)]  # type: ignore[method-assign] # one after the other
    weights.claim(0)
    weights.put_model(MODEL)
    for number in range(2):
        manifest, parts = version(number)
        weights.publish(sign(manifest, KEY), parts)


def check_found(files: VolatileFiles) -> int:
    """The newest version that is found, all of it proven; -1 for none."""
    weights = WeightStore(LocalStore(ROOT, files), "run", KEY)
    for manifest in weights.manifests():
        assert weights.parts(manifest) == version(manifest.number)[1], "a manifest without its bytes"
    found = weights.latest()
    if found is None:
        return -1
    manifest = weights.manifest(Artefact(found.epoch, found.number))
    assert manifest.root == found.root
    return found.number


STEPS = VolatileFiles()
publish_two(STEPS)


@pytest.mark.thorough
@pytest.mark.parametrize("dies_at", range(len(STEPS.steps) + 1))
def test_power_is_lost_before_any_step(dies_at: int) -> None:
    """Whatever was not made durable is lost or kept, torn or whole: nothing of half a version is ever read, and going on succeeds."""
    newest = set()
    for keeps, torn in itertools.product((True, False), (lambda data: data, lambda data: data[: len(data) // 2], lambda _: b"")):
        files = VolatileFiles(dies_at)
        with contextlib.suppress(PowerLoss):
            publish_two(files)
        found = files.after(lambda _, keeps=keeps: keeps, torn)
        newest.add(check_found(found))
        go_on(found)
    if dies_at == len(STEPS.steps):
        assert newest == {1}, "what publish returned for is durable"
    assert len(newest) <= 2


def go_on(files: VolatileFiles) -> None:
    """A resumed trainer publishes the next version in a new epoch."""
    weights = WeightStore(LocalStore(ROOT, files), "run", KEY)
    epoch, before = weights.claim(1)
    number = before.number + 1
    manifest, parts = version(number, epoch, parent_epoch=before.epoch)
    weights.publish(sign(manifest, KEY), parts)
    found = WeightStore(LocalStore(ROOT, files), "run", KEY).latest()
    assert found is not None and (found.epoch, found.number) == (epoch, number)


@pytest.mark.thorough
@settings(max_examples=75, deadline=None)
@given(st.integers(0, len(STEPS.steps)), st.data())
def test_any_part_of_what_is_not_durable_survives(dies_at: int, data: st.DataObject) -> None:
    files = VolatileFiles(dies_at)
    with contextlib.suppress(PowerLoss):
        publish_two(files)
    found = files.after(lambda _: data.draw(st.booleans()), lambda bits: bits[: data.draw(st.integers(0, len(bits)))])
    check_found(found)
    go_on(found)


def test_the_simulation_catches_a_missing_fsync() -> None:
    """Without a sync of the bytes, or of the directory, the tests above would fail."""

    class NoSync(VolatileFiles):
        def sync(self, path: Path) -> None:
            self._step(f"none {path}")

    files = NoSync()
    publish_two(files)
    with pytest.raises((ManifestError, AssertionError)):
        check_found(files.after(lambda _: True, lambda _: b""))

    class NoDirectorySync(VolatileFiles):
        def sync_directory(self, path: Path) -> None:
            self._step(f"none {path}")
            self.durable_directories |= self.directories

    files = NoDirectorySync()
    publish_two(files)
    with pytest.raises((ManifestError, Missing)):
        check_found(files.after(lambda name: name.endswith("latest"), lambda data: data))


def test_the_pointer_comes_last() -> None:
    """Order of the names that appear: parts, manifest, pointer."""
    names = [Path(step.split()[2]).name for step in STEPS.steps if step.startswith("rename") and "model" not in step.split()[2]]
    kinds = ["part" if name.startswith("part-") else name for name in names]
    assert kinds == ["latest", *["part", "part", "manifest.json", "latest"] * 2]


@pytest.mark.parametrize("room", range(0, 1400, 100))
def test_a_full_disk(tmp_path: Path, room: int) -> None:
    files = FullDisk(room)
    manifest, parts = version(0)
    try:
        weights = WeightStore(LocalStore(tmp_path, files), "run")
        weights.claim(0)
        weights.publish(manifest, parts)
    except OSError as error:
        assert "No space left" in str(error) and not list(tmp_path.rglob(".tmp-*")), "it leaves its room to others"
        assert WeightStore(LocalStore(tmp_path), "run").latest() is None
        files.room = 1 << 20
        again = WeightStore(LocalStore(tmp_path, files), "run")
        again.claim(0)
        manifest, parts = version(0, epoch=again.claim(1)[0])
        again.publish(manifest, parts)
    assert WeightStore(LocalStore(tmp_path), "run").latest() is not None


def test_a_killed_publisher_s_parts_are_swept(tmp_path: Path) -> None:
    weights = WeightStore(LocalStore(tmp_path), "run")
    weights.claim(0)
    for number in range(3):
        weights.publish(*version(number))
    for number in (1, 2):
        (tmp_path / f"run/0/v{number:08d}/manifest.json").unlink()
    swept = weights.sweep(before=(0, 2))
    assert len(swept) == 2 and all(name.startswith("run/0/v00000001/part-") for name in swept)
    assert sorted(p.name for p in (tmp_path / "run/0/v00000001").iterdir()) == []
    assert len(list((tmp_path / "run/0/v00000002").iterdir())) == 2, "what may still be written is left alone"
