"""A checkpoint that was torn anywhere, while it was written or afterwards, is not there; the one before it is."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from slime.checkpoint import manifest, save
from slime.checkpoint.batch import read_batch, write_batch
from slime.checkpoint.manifest import InvalidCheckpoint
from slime.checkpoint.origin import KnownFile, Origin
from slime.checkpoint.restore import newest, validate
from slime.checkpoint.retention import keep_newest
from slime.checkpoint.save import POINTER, begin, commit, iteration, iterations
from slime.checkpoint.state import DriverState, read_state, write_state
from slime.types import Batch, WeightVersion

pytestmark = pytest.mark.thorough


def batch_of(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, 99, 7).astype(np.int32),
        cu_seqlens=np.array([0, 3, 7]),
        loss_mask=np.array([0, 0, 1, 0, 0, 1, 1], bool),
        rollout_logprobs=rng.normal(size=7).astype(np.float32),
        rewards=rng.normal(size=2),
        group=np.array([4, 4]),
        version=np.array([3, 2]),
    )


def state_of(step: int) -> DriverState:
    return DriverState(
        step=step,
        version=WeightVersion(epoch=1, number=step, run_id="run"),
        ledger={"next": 3 * step, "dropped": {"5": "too_long"}},
        trackers={"wandb": "abc"},
        config={"run": {"seed": 0, "lr": 1e-6}},
        wall_s=12.25,
        origin=Origin({"torch": "2.13.0"}, [KnownFile("a.jsonl", 5, "ab")]),
    )


def fill(directory: Path, step: int) -> None:
    (directory / "trainer").mkdir()
    (directory / "trainer" / "shard_0.distcp").write_bytes(os.urandom(3000))
    (directory / "trainer" / "common.pt").write_bytes(b"common" * step)
    write_batch(directory, batch_of(step))
    write_state(directory, state_of(step))


def saved(run_dir: Path, *steps: int) -> None:
    for step in steps:
        fill(begin(run_dir, step), step)
        commit(run_dir, step)


FILES = ["trainer/shard_0.distcp", "trainer/common.pt", "batch.npz", "state.json", "manifest.json"]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10)
    assert (tmp_path / POINTER).read_text() == "10\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "iter_0000010", POINTER]
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.refused) == (10, tmp_path / "iter_0000010", ())
    assert found.state == state_of(10)
    restored, written = read_batch(found.path), batch_of(10)
    assert restored is not None
    assert restored.columns().keys() == written.columns().keys()
    for name, a in restored.columns().items():
        b = written.columns()[name]
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


def test_a_run_without_checkpoints_starts_from_nothing(tmp_path: Path) -> None:
    fill(begin(tmp_path, 5), 5)  # a save that never came to its commit
    assert newest(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip_first", "flip_last", "missing", "longer", "empty"])
def test_a_torn_file_makes_the_one_before_count(tmp_path: Path, name: str, damage: str) -> None:
    saved(tmp_path, 5, 10)
    path = tmp_path / "iter_0000010" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        if damage.startswith("flip"):
            content[0 if damage == "flip_first" else len(content) // 2] ^= 1
        damaged = {"cut": content[:-9], "longer": content + b"!", "empty": b""}.get(damage, content)
        path.write_bytes(damaged)
    found = newest(tmp_path)
    assert found is not None and found.step == 5 and found.state == state_of(5)
    assert [r.path.name for r in found.refused] == ["iter_0000010"]
    assert name in str(found.refused[0])
    (tmp_path / "iter_0000005" / "state.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"none of the checkpoints.*iter_0000010.*iter_0000005: state.json is missing"):
        newest(tmp_path)


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    path = tmp_path / "iter_0000005" / "manifest.json"
    content = path.read_bytes()
    for at in range(len(content) - 1):
        if content[at : at + 1].isspace():
            continue  # a blank between two values says nothing
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(InvalidCheckpoint):
            manifest.verify(path.parent, step=5)


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The driver dies before its `call`-th request to make something durable, visible or gone."""
    count = [0]

    def counted(function):
        def wrapper(*args, **kwargs):
            count[0] += 1
            if count[0] > call:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def killed_everywhere(monkeypatch: pytest.MonkeyPatch, prepare, act, check) -> list:
    """Run `act` again and again, killed one call later each time, until it finishes; what `check` returned each time."""
    seen = []
    for call in range(200):
        prepare()
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                act()
                finished = True
            except Killed:
                finished = False
        seen.append(check())
        if finished:
            return seen
    raise AssertionError("it never finished")


def test_a_kill_at_any_point_of_a_commit_leaves_a_whole_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        saved(tmp_path, 5)
        fill(begin(tmp_path, 10), 10)

    def check() -> int:
        pointer = int((tmp_path / POINTER).read_text())
        found = newest(tmp_path)
        assert found is not None and found.refused == () and found.state == state_of(found.step)
        assert pointer <= found.step, "the pointer leads the bytes"
        assert {p.name for p in tmp_path.glob("iter_*")} == {iteration(tmp_path, s).name for s in (5, found.step)}
        return found.step

    steps = killed_everywhere(monkeypatch, prepare, lambda: commit(tmp_path, 10), check)
    assert len(steps) > 8 and steps == sorted(steps) and (steps[0], steps[-1]) == (5, 10)


def test_a_kill_while_an_iteration_is_replaced_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        saved(tmp_path, 10)
        fill(begin(tmp_path, 10), 10)
        (tmp_path / "iter_0000010.tmp" / "second").write_text("")

    def check() -> bool:
        found = newest(tmp_path)
        assert found is not None and found.step == 10
        assert [p.name for p in tmp_path.glob("iter_*")] == ["iter_0000010"]
        return (found.path / "second").exists()

    which = killed_everywhere(monkeypatch, prepare, lambda: commit(tmp_path, 10), check)
    assert which == sorted(which) and (which[0], which[-1]) == (False, True)


def test_a_kill_while_old_ones_are_deleted_keeps_the_rest_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        saved(tmp_path, 1, 2, 3, 4)

    def check() -> list[int]:
        found = newest(tmp_path)
        assert found is not None and found.step == 4
        for path in iterations(tmp_path).values():
            validate(path)
        return list(iterations(tmp_path))

    seen = killed_everywhere(monkeypatch, prepare, lambda: keep_newest(tmp_path, 2), check)
    assert (seen[0], seen[-1]) == ([1, 2, 3, 4], [3, 4])


def test_retention_counts_complete_iterations_only(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / "iter_0000003" / "batch.npz").unlink()
    (tmp_path / "iter_0000004" / "manifest.json").write_text("{")
    assert keep_newest(tmp_path, 3) == []
    assert keep_newest(tmp_path, 2) == []
    assert keep_newest(tmp_path, 1) == [tmp_path / "iter_0000001"]
    saved(tmp_path, 5)
    assert [p.name for p in keep_newest(tmp_path, 1)] == ["iter_0000002", "iter_0000003", "iter_0000004"]
    assert list(iterations(tmp_path)) == [5]


def test_a_pointer_to_nothing_is_told_and_does_not_start_a_run_anew(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / POINTER).write_text("20\n")
    found = newest(tmp_path)
    assert found is not None and found.step == 5
    assert "iter_0000020" in str(found.refused[0]) and "not there" in str(found.refused[0])
    assert (tmp_path / POINTER).read_text() == "5\n", "it names what the run goes on from"
    shutil.rmtree(tmp_path / "iter_0000005")
    with pytest.raises(InvalidCheckpoint, match="iter_0000005"):
        newest(tmp_path)


def test_a_late_pointer_does_not_hide_a_newer_iteration(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10)
    (tmp_path / POINTER).write_text("5\n")
    found = newest(tmp_path, mend=False)
    assert found is not None and found.step == 10 and (tmp_path / POINTER).read_text() == "5\n"
    assert newest(tmp_path) == found and (tmp_path / POINTER).read_text() == "10\n"


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    shutil.copytree(tmp_path / "iter_0000005", tmp_path / "iter_0000007")
    found = newest(tmp_path)
    assert found is not None and found.step == 5 and "step 5" in found.refused[0].reason
    with pytest.raises(InvalidCheckpoint, match="not named like a checkpoint"):
        validate(tmp_path)


def test_a_link_is_refused_at_the_save(tmp_path: Path) -> None:
    directory = begin(tmp_path, 5)
    fill(directory, 5)
    (directory / "weights").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="weights is not a plain file"):
        commit(tmp_path, 5)
    assert save.iterations(tmp_path) == {}


def test_a_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    import dataclasses

    for bad in ({1: "int key"}, {"t": (1, 2)}, {"x": float("nan")}):
        with pytest.raises(ValueError):
            write_state(tmp_path, dataclasses.replace(state_of(1), ledger=bad))
    (tmp_path / "state.json").write_text('{"step": 1}')
    with pytest.raises(InvalidCheckpoint, match=r"state\.json"):
        read_state(tmp_path)


def test_an_iteration_without_a_batch_has_none(tmp_path: Path) -> None:
    assert read_batch(tmp_path) is None
    (tmp_path / "batch.npz").write_bytes(b"not a zip")
    with pytest.raises(InvalidCheckpoint, match=r"batch\.npz"):
        read_batch(tmp_path)
