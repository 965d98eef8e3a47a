"""Saves beside the training: the loop waits for a snapshot, a thread makes it durable.

    saver = Saver(run_dir, keep_last=2, keep_every=0, timeout_s=600)
    saver.start(10, trainer.save, write_rest)       # the ranks hold their shares; training goes on
    for committed in saver.poll(): ...              # what has become durable since
    saver.wait(); saver.close()

At most one save is in flight. What is durable only ever grows: an iteration appears whole by its rename, the pointer follows, then older
ones are deleted. A process that ends in between leaves what was there before.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slime.checkpoint import batch, save
from slime.checkpoint.retention import keep_newest
from slime.checkpoint.state import read_state
from slime.cluster.deadline import STEP_KNOB
from slime.observe.hashed import File

log = logging.getLogger(__name__)

POLL_S = 0.05  # between two looks at the ranks
NICE = 19  # of the thread that hashes: where cores are few, training goes first
CLOSE_S = 30.0  # how long a commit that has begun may take to end when a run fails


class Saving(Protocol):
    """Shards on their way to the disk (`slime.trainer.saving.Saving`)."""

    def done(self) -> bool: ...

    def result(self, timeout_s: float) -> Mapping[str, File]: ...


@dataclass(frozen=True, slots=True)
class Committed:
    """An iteration that is durable and verified."""

    step: int
    path: Path
    seconds: float  # from the start of the save


class Saver:
    """The driver's side of all saves of a run. One thread of the driver calls it."""

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int, timeout_s: float) -> None:
        """`keep_last` and `keep_every` are those of the recipe; `timeout_s` (cluster.step_timeout_s) is how long the ranks may write."""
        self._run_dir, self._keep_last, self._keep_every, self._timeout_s = run_dir, keep_last, keep_every, timeout_s
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="saver", initializer=_give_way)
        self._flying: futures.Future[Committed] | None = None
        self._landed: list[Committed] = []
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._flying is not None and not self._flying.done()

    def start(self, step: int, shards: Callable[[Path], Saving], write_rest: Callable[[Path], None]) -> None:
        """Begin the save of `step`, after the one before has ended. Returns when `shards` does.

        `shards` is given the folder of the iteration, on the calling thread; what it returns writes the ranks' shards into folders there,
        and names its files relative to it. `write_rest` writes everything else, on another thread: what it refers to must not change any
        more.
        Raises what the save before raised, what `shards` raises, and OSError where the disk refuses.
        """
        self._land(self._timeout_s, STEP_KNOB)
        begun = time.monotonic()
        directory = save.begin(self._run_dir, step)
        saving = shards(directory)
        self._flying = self._pool.submit(self._finish, step, directory, saving, write_rest, begun)

    def poll(self) -> list[Committed]:
        """What has become durable since the last call; does not wait. Raises what a save raised: OSError where a disk refused or gave back
        other bytes, ProcessLost where a rank died, TimeoutError where the ranks took longer than cluster.step_timeout_s."""
        if not self.busy:
            self._land(0.0, STEP_KNOB)
        landed, self._landed = self._landed, []
        return landed

    def wait(self, timeout_s: float, knob: str) -> list[Committed]:
        """As `poll`, after the save in flight has ended. Raises TimeoutError naming `knob` where that takes longer than `timeout_s`."""
        self._land(timeout_s, knob)
        return self.poll()

    def close(self) -> None:
        """End of a run, failed or not: a save in flight does not become visible any more, unless it is about to. What is left of it is
        removed by the next start."""
        self._abandoned.set()
        if self._flying is not None:
            futures.wait([self._flying], CLOSE_S)
        self._pool.shutdown(wait=False)

    def _land(self, timeout_s: float, knob: str) -> None:
        if self._flying is None:
            return
        futures.wait([self._flying], timeout_s)
        if not self._flying.done():
            raise TimeoutError(f"waiting for the save in {self._run_dir}: nothing after {timeout_s:g} s ({knob})")
        landed, self._flying = self._flying, None
        self._landed.append(landed.result())

    def _finish(self, step: int, directory: Path, saving: Saving, write_rest: Callable[[Path], None], begun: float) -> Committed:
        write_rest(directory)
        shards = self._written(saving)
        _check_rest(directory)
        path = save.commit(self._run_dir, step, shards, self._abandoned.is_set)
        committed = Committed(step, path, time.monotonic() - begun)
        try:
            keep_newest(self._run_dir, self._keep_last, self._keep_every, step)
        except OSError as error:  # the new iteration is safe; what should have gone does so at the next save or start
            log.error("older checkpoints of %s could not be deleted: %s", self._run_dir, error)
        return committed

    def _written(self, saving: Saving) -> Mapping[str, File]:
        until = time.monotonic() + self._timeout_s
        while not saving.done() and time.monotonic() < until:
            self._abandoned.wait(POLL_S)
            if self._abandoned.is_set():
                break
        if self._abandoned.is_set():
            raise save.GivenUp("the run has ended before its save")
        if not saving.done():
            raise TimeoutError(f"waiting for the trainer to write {self._run_dir}: nothing after {self._timeout_s:g} s ({STEP_KNOB})")
        return saving.result(self._timeout_s)


def _check_rest(directory: Path) -> None:
    """What the driver wrote is readable, before anything older is deleted for it."""
    read_state(directory)
    batch.read_batch(directory)


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
