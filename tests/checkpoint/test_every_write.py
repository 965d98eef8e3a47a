"""Whatever goes wrong at any one write, fsync, rename, mkdir or unlink of a whole save, real shards and retention included: the newest
valid iteration is found, its bytes are those that were saved, and nothing valid is gone.

Not covered: a bit that flips in memory before a file is hashed.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import pytest

from slime.checkpoint import save
from slime.checkpoint.batch import write_batch
from slime.checkpoint.manifest import InvalidCheckpoint
from slime.checkpoint.restore import newest
from slime.checkpoint.save import POINTER, iterations
from slime.checkpoint.saver import Committed, Saver
from slime.checkpoint.state import write_state
from tests.checkpoint.disk import KINDS, OF_ALL, Disk, Killed
from tests.checkpoint.test_checkpoint_crashes import batch_of, state_of
from tests.tiny import make_tiny
from tests.trainer.ranks import Ranks, make_batch, make_cfg

pytestmark = pytest.mark.e2e
EVERY_S = 300.0  # for a save as often as it has operations


class Written:
    """Shards that a rank in this process writes when they are waited for."""

    def __init__(self, snapshot) -> None:
        self.snapshot = snapshot

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float):
        return {f"trainer/{name}": file for name, file in self.snapshot.write().items()}


class Saved:
    """A run's directory with iterations of real shards, and the next save of it."""

    def __init__(self, place, cfg, folder: Path) -> None:
        from slime.trainer import shards, step
        from slime.trainer.host_buffers import HostBuffers

        trainer = place.trainer(cfg)
        self.template, self.run_dir, self.snapshots = folder / "template", folder / "run", {}
        for at in (5, 10, 15):
            step.train_batch(trainer, make_batch(vocab=77, seed=at))
            self.snapshots[at] = shards.snapshot(trainer, folder, HostBuffers(pinned=False))
        self.expected = {}
        for at in (5, 10, 15):
            shutil.rmtree(self.template, ignore_errors=True)
            self.template.mkdir()
            assert [c.step for c in self.save(self.template, at, keep=1)] == [at]
            self.expected[at] = content(save.iteration(self.template, at))
        shutil.rmtree(self.template)
        self.template.mkdir()

    def save(self, run_dir: Path, at: int, keep: int) -> list[Committed]:
        saver = Saver(run_dir, keep, 0, 60.0)

        def rest(directory: Path) -> None:
            write_batch(directory, batch_of(at))
            write_state(directory, state_of(at))

        try:
            saver.start(at, lambda directory: Written(dataclasses.replace(self.snapshots[at], directory=directory / "trainer")), rest)
            return saver.wait(60.0, "a test")
        finally:
            saver.close()

    def again(self) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.template, self.run_dir)


def content(directory: Path) -> dict[str, bytes]:
    """Of every file that a resume reads, but torch's index: it holds the folder's name, and is pickled with ids of its own."""
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in ("manifest.json", "trainer/.metadata")}


def unsound(saved: Saved, kind: str, reported: list[Committed]) -> str:
    """What a resume after the fault finds wrong, or nothing."""
    before = {step: content(path) for step, path in iterations(saved.run_dir).items()}
    found = newest(saved.run_dir)
    if found is None:
        return "nothing is left"
    if content(found.path) != saved.expected[found.step] or found.state != state_of(found.step):
        return f"step {found.step} is found and has other bytes than were saved"
    if reported and found.step != 10:
        return "it was reported as saved and is not there"
    whole = max((step for step, files in before.items() if files == saved.expected[step] and step != 10), default=0)
    if found.step < whole:
        return f"step {whole} was whole"
    text = (saved.run_dir / POINTER).read_bytes().strip()
    if kind in OF_ALL and int(text) > found.step:
        return f"the pointer leads the bytes: {text!r}"
    return ""


def every_operation(place, cfg, folder: Path, kind: str, sampled: bool) -> tuple[int, list[str]]:
    """(operations of a save that goes well, what went wrong with a fault at each)."""
    saved = Saved(place, cfg, folder)
    saved.save(saved.template, 5, keep=1)
    saved.again()
    with Disk(saved.run_dir).installed() as disk:
        saved.save(saved.run_dir, 10, keep=1)
    assert list(iterations(saved.run_dir)) == [10], "retention is part of the save"
    faults = []
    for at in points(disk.operations) if sampled else range(len(disk.operations)):
        operation = disk.operations[at]
        if kind not in OF_ALL and not operation.startswith("write"):
            continue
        saved.again()
        reported = []
        with Disk(saved.run_dir, at, kind).installed(), contextlib.suppress(OSError, InvalidCheckpoint, Killed):
            reported = saved.save(saved.run_dir, 10, keep=1)
        where = f"{kind} at {at}, {operation}: "
        try:
            if wrong := unsound(saved, kind, reported):
                faults.append(where + wrong)
            saved.save(saved.run_dir, 15, keep=1)
            if (after := newest(saved.run_dir)) is None or after.step != 15 or list(iterations(saved.run_dir)) != [15]:
                faults.append(where + "the next save is not the newest")
        except (OSError, ValueError) as error:
            faults.append(f"{where}{error!r}")
    return len(disk.operations), faults


def points(operations: list[str]) -> list[int]:
    """Of operations of one name (the tensors of a file) the first, the last and one in between."""
    found: dict[str, list[int]] = {}
    for at, operation in enumerate(operations):
        found.setdefault(operation, []).append(at)
    return sorted({at for same in found.values() for at in (same[0], same[len(same) // 2], same[-1])})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", vocab=77)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [pytest.param(True, id="of each kind"), pytest.param(False, id="all", marks=pytest.mark.slow)])
def test_a_fault_at_any_operation_of_a_save(ranks, model, tmp_path, kind: str, sampled: bool) -> None:
    [(operations, faults)] = ranks.run(every_operation, 1, make_cfg(model), tmp_path, kind, sampled, answer_s=EVERY_S)
    assert operations > 40
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_to_any_file_after_the_save_is_found(ranks, model, tmp_path, damage: str) -> None:
    ranks.run(saved_twice, 1, make_cfg(model), tmp_path)
    names = sorted(path.relative_to(tmp_path / "run" / "iter_0000010") for path in (tmp_path / "run" / "iter_0000010").rglob("*.*"))
    assert {"__0_0.distcp", "common.pt", ".metadata", "metadata.json"} <= {name.name for name in names}
    for name in names:
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        path = tmp_path / "again" / "iter_0000010" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 16
        path.unlink()
        if damage != "gone":
            path.write_bytes(data if damage == "flip" else data[:-1])
        found = newest(tmp_path / "again")
        assert found is not None and found.step == 5 and [refused.path.name for refused in found.refused] == ["iter_0000010"], name
        shutil.rmtree(tmp_path / "again")


def saved_twice(place, cfg, folder: Path) -> None:
    saved = Saved(place, cfg, folder)
    for at in (5, 10):
        saved.save(saved.run_dir, at, keep=2)
