"""A save whose bytes are on their way to the disk while the ranks train on; and which ranks died."""

from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError

from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB, ProcessLost
from slime.observe.hashed import File

SETTLE_S = 10.0  # after a failure: how long the other ranks may take to fail too


@dataclass(frozen=True)
class Saving:
    """What `TrainerGroup.save` has begun: every rank holds its share in host memory and writes it."""

    directory: Path
    host_bytes: int  # host memory that the largest share takes until it is written
    refs: "list[ray.ObjectRef]"  # of `Rank.write`, one a rank
    names: list[str]  # of the ranks

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        return settled(self.refs)

    def result(self, timeout_s: float) -> dict[str, File]:
        """Wait until the shards of all ranks are on disk; their files by name below `directory`, as they were meant to be written.

        Raises OSError where a disk refused, ProcessLost where a rank died, TimeoutError naming cluster.step_timeout_s.
        """
        what = f"the trainer to write {self.directory}"
        try:
            shares = deadline.get(self.refs, timeout_s, what, STEP_KNOB)
        except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            if not isinstance(error, ProcessLost) and (dead := settle(self.refs)[1]):
                raise lost_rank(what, self.names[dead[0]]) from error
            raise
        return {name: file for share in shares for name, file in share.items()}


def settled(refs: "list[ray.ObjectRef]") -> bool:
    """Whether waiting for all of them would return or raise at once."""
    ready, waiting = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
    return not waiting or any(_failure(ref) for ref in ready)


def settle(refs: "list[ray.ObjectRef]") -> tuple[list[int], list[int]]:
    """After a call of all ranks failed on one: (ranks that go on waiting, ranks whose process ended)."""
    settled, _ = ray.wait(refs, num_returns=len(refs), timeout=SETTLE_S) if refs else ([], [])
    waiting = [rank for rank, ref in enumerate(refs) if ref not in settled]
    return waiting, [rank for rank, ref in enumerate(refs) if ref in settled and isinstance(_failure(ref), RayActorError)]


def lost_rank(what: str, name: str) -> ProcessLost:
    """The error that names a rank whose process ended."""
    return ProcessLost(f"waiting for {what}: {name} died; its log is in Ray's session directory")


def _failure(ref: "ray.ObjectRef") -> RayError | None:
    """Why a settled call failed: RayActorError where its actor's process or host is gone; None where it did not."""
    try:
        ray.get(ref, timeout=0)
    except RayError as error:
        return error
    return None
