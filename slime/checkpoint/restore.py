"""Which iteration a run resumes from."""

import re
from dataclasses import dataclass
from pathlib import Path

from slime.checkpoint import manifest
from slime.checkpoint.save import POINTER, clean_up, iteration, iterations, point_at
from slime.checkpoint.state import DriverState, read_state


@dataclass(frozen=True, slots=True)
class Refused:
    """An iteration that does not count, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Restored:
    """The newest valid iteration of a run."""

    step: int
    path: Path
    state: DriverState
    refused: tuple[Refused, ...]  # newer ones that were passed over, newest first; tell the user


def newest(run_dir: Path, mend: bool = True) -> Restored | None:
    """The newest iteration whose every byte is as its manifest says; None where the run never committed one.

    Goes by the manifests alone, never by the pointer. First undoes what a crash left half done in `run_dir`, and lets the pointer name what
    was found; whoever is not the run's own driver passes mend=False, since a save may be going on there.

    Raises InvalidCheckpoint naming each iteration and its fault where there are some but none is valid: such a run must not silently
    begin again.
    """
    if mend:
        clean_up(run_dir)
    refused = _named_but_absent(run_dir)
    for step, path in reversed(iterations(run_dir).items()):
        try:
            found = Restored(step, path, validate(path), tuple(refused))
            if mend and _pointed_at(run_dir) != str(step):
                point_at(run_dir, step)
            return found
        except manifest.InvalidCheckpoint as error:
            refused.append(Refused(path, str(error)))
    if refused:
        faults = "; ".join(map(str, refused))
        raise manifest.InvalidCheckpoint(
            f"run.resume: none of the checkpoints of {run_dir} is valid: {faults}. Restore the files, or start anew under another run.name"
        )
    return None


def validate(path: Path) -> DriverState:
    """Check one iteration whole (`run.resume=<path>` names one) and read its state. Raises InvalidCheckpoint with the fault."""
    match = re.fullmatch(r"iter_(\d{7,})", path.name)
    if not match:
        raise manifest.InvalidCheckpoint(f"{path} is not named like a checkpoint, iter_0000010")
    manifest.verify(path, step=int(match[1]))
    state = read_state(path)
    if state.step != int(match[1]):
        raise manifest.InvalidCheckpoint(f"its driver state is of step {state.step}")
    return state


def _pointed_at(run_dir: Path) -> str:
    pointer = run_dir / POINTER
    return pointer.read_text(errors="replace").strip() if pointer.exists() else ""


def _named_but_absent(run_dir: Path) -> list[Refused]:
    text = _pointed_at(run_dir)
    if not text.isdigit() or iteration(run_dir, int(text)).exists():
        return []
    return [Refused(iteration(run_dir, int(text)), f"{POINTER} names it, but it is not there")]
