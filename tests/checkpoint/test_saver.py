"""The driver's side of saves in flight: one at a time, reported when durable, raised when refused, given up when the run ends."""

import threading
from pathlib import Path

import pytest

from slime.checkpoint.restore import newest
from slime.checkpoint.retention import keep_newest
from slime.checkpoint.save import POINTER, iterations
from slime.checkpoint.saver import Saver
from slime.checkpoint.state import write_state
from slime.observe.hashed import File, write_hashed
from tests.checkpoint.test_checkpoint_crashes import saved, state_of


class Ranks:
    """Shards that are on disk when the test says so."""

    def __init__(self, content: bytes = b"weights", error: Exception | None = None) -> None:
        self.content, self.error, self.written = content, error, threading.Event()

    def __call__(self, directory: Path) -> "Ranks":
        self.directory = directory / "trainer"
        self.directory.mkdir()
        return self

    def done(self) -> bool:
        return self.written.is_set()

    def result(self, timeout_s: float) -> dict[str, File]:
        if not self.written.wait(timeout_s):
            raise TimeoutError("waiting for the ranks")
        if self.error is not None:
            raise self.error
        return {"trainer/shard": write_hashed(self.directory / "shard", self.content)}

    def end(self) -> "Ranks":
        self.written.set()
        return self


def rest(step: int):
    return lambda directory: write_state(directory, state_of(step))


@pytest.fixture
def saver(tmp_path):
    made = Saver(tmp_path, 2, 0, 5.0)
    yield made
    made.close()


def test_training_goes_on_until_the_bytes_are_durable(saver, tmp_path) -> None:
    ranks = Ranks()
    saver.start(10, ranks, rest(10))
    assert saver.busy and saver.poll() == [] and iterations(tmp_path) == {} and not (tmp_path / POINTER).exists()
    with pytest.raises(TimeoutError, match=r"nothing after 0\.01 s \(run\.grace_s\)"):
        saver.wait(0.01, "run.grace_s")
    ranks.end()
    [committed] = saver.wait(5, "run.grace_s")
    assert (committed.step, committed.path, saver.busy) == (10, tmp_path / "iter_0000010", False) and committed.seconds > 0
    assert saver.poll() == [] and saver.wait(0, "run.grace_s") == []
    found = newest(tmp_path)
    assert found is not None and found.step == 10 and (found.path / "trainer" / "shard").read_bytes() == b"weights"


def test_the_next_save_waits_for_the_one_in_flight(saver, tmp_path) -> None:
    slow = Ranks()
    saver.start(1, slow, rest(1))
    threading.Timer(0.1, slow.end).start()
    saver.start(2, Ranks().end(), rest(2))
    assert list(iterations(tmp_path))[:1] == [1], "the second began before the first was durable"
    assert [committed.step for committed in saver.wait(5, "a test")] == [1, 2]


def test_a_failed_save_is_raised_once_and_the_next_one_goes_well(saver, tmp_path) -> None:
    saver.start(1, Ranks().end(), rest(1))
    saver.wait(5, "a test")
    saver.start(2, Ranks(error=OSError("no space left")).end(), rest(2))
    with pytest.raises(OSError, match="no space left"):
        saver.wait(5, "a test")
    assert saver.poll() == [] and list(iterations(tmp_path)) == [1]
    saver.start(3, Ranks().end(), rest(3))
    assert [committed.step for committed in saver.wait(5, "a test")] == [3]


def test_ranks_that_never_end_are_a_named_error(tmp_path) -> None:
    saver = Saver(tmp_path, 2, 0, 0.1)
    saver.start(1, Ranks(), rest(1))
    with pytest.raises(TimeoutError, match=r"waiting for the trainer to write .*: nothing after 0\.1 s"):
        saver.wait(5, "a test")
    saver.close()


def test_a_run_that_ends_gives_up_its_save(tmp_path) -> None:
    saved(tmp_path, 5)
    saver, ranks = Saver(tmp_path, 1, 0, 60.0), Ranks()
    saver.start(10, ranks, rest(10))
    saver.close()
    ranks.end()
    assert list(iterations(tmp_path)) == [5] and (tmp_path / "iter_0000010.tmp").is_dir()
    found = newest(tmp_path)
    assert found is not None and found.step == 5 and not (tmp_path / "iter_0000010.tmp").exists()


def test_a_disk_that_gives_back_other_bytes_is_refused(saver, tmp_path) -> None:
    class Lying(Ranks):
        def result(self, timeout_s: float) -> dict[str, File]:
            files = super().result(timeout_s)
            (self.directory / "shard").write_bytes(b"weighty")
            return files

    saver.start(1, Lying().end(), rest(1))
    with pytest.raises(OSError, match=r"shard is not what was written to it: other content"):
        saver.wait(5, "a test")
    assert iterations(tmp_path) == {}


def test_every_nth_stays_for_good(tmp_path) -> None:
    saver = Saver(tmp_path, 1, 4, 5.0)
    for step in range(1, 11):
        saver.start(step, Ranks().end(), rest(step))
    saver.wait(5, "a test")
    saver.close()
    assert list(iterations(tmp_path)) == [4, 8, 10]


def test_what_a_resume_passed_over_counts_for_nothing(tmp_path) -> None:
    """A newer iteration whose content was damaged still has its sizes: it must not push out the sound ones."""
    saved(tmp_path, 5, 10, 20)
    shard = tmp_path / "iter_0000020" / "trainer" / "shard_0.distcp"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert keep_newest(tmp_path, 1, committed=10) == [tmp_path / "iter_0000005"]
    found = newest(tmp_path)
    assert found is not None and found.step == 10


def test_nothing_goes_for_an_iteration_that_is_not_whole(tmp_path) -> None:
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "iter_0000003" / "state.json").unlink()
    assert keep_newest(tmp_path, 1, committed=3) == []
    assert list(iterations(tmp_path)) == [1, 2, 3]
