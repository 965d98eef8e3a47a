"""density.jsonl: how many elements of each Hugging Face tensor changed with each published version of the weights.

    {"tensors":[["model.embed_tokens.weight",8192],["model.norm.weight",64]]}     name and elements, once
    {"step":1,"changed":[211,0]}                                                  what version 1 changed, in the same order
    {"step":2,"changed":[198,1]}

Steps ascend; one is missing where no version was published. A model of experts has tens of thousands of tensors, so a line is written as
short as JSON allows, and the reader adds tensors up while it reads.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from slime.observe.files import fsync_directory, write_atomic

log = logging.getLogger(__name__)

NAME = "density.jsonl"
_STEP = re.compile(rb'\{"step":(\d+),"changed":\[')
Tensor = tuple[str, int]  # name, elements
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Density(Generic[Key]):
    """Changes of the weights, version by version."""

    tensors: list[tuple[Key, int]]  # name, or what stands for several tensors, and elements
    steps: list[int]  # ascending
    changed: np.ndarray  # int64 [steps, tensors]: elements that changed

    @property
    def sizes(self) -> np.ndarray:
        """Elements of each tensor, int64 [tensors]."""
        return np.array([size for _, size in self.tensors], np.int64)


class DensityLog:
    """Appends one durable line a version. One process writes a file; any number may read it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Carries on an existing file; a last line torn by a crash is cut off. Raises ValueError for any other damage."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tensors: list[Tensor] | None = None
        self._ends: dict[int, int] = {}  # step -> where its line ends
        if path.exists():
            self._tensors, self._ends, whole = _scan(path)
            if whole < path.stat().st_size:
                log.warning("%s: the last line was cut off by a crash and is dropped", path)
                self._cut(whole)

    @property
    def last_step(self) -> int:
        """The newest step that is recorded, -1 where none is."""
        return next(reversed(self._ends), -1)

    def append(self, step: int, changed: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Record `step` and fsync. Raises ValueError for a step that is not after the last one, other tensors than the file's and counts
        that no tensor of that size has; OSError where the disk refuses."""
        if step <= self.last_step:
            raise ValueError(f"{self.path}: step {self.last_step} is recorded, {step} cannot follow (truncate first on a resume)")
        named = [(str(name), int(size)) for name, size in tensors]
        if self._tensors is not None and named != self._tensors:
            raise ValueError(f"{self.path}: step {step} is of other tensors than the file's: {_difference(self._tensors, named)}")
        counts = [int(n) for n in changed]
        if len(counts) != len(named):
            raise ValueError(f"{self.path}: step {step} has {len(counts)} counts for {len(named)} tensors")
        for (name, size), count in zip(named, counts, strict=True):
            if not 0 <= count <= size:
                raise ValueError(f"{self.path}: step {step} says that {count} elements of {name} changed, which has {size}")
        new = self._tensors is None
        line = (_encode({"tensors": named}) if new else b"") + _encode({"step": step, "changed": counts})
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._ends[step] = file.tell()
        if new:
            fsync_directory(self.path.parent)
        self._tensors = named

    def truncate(self, step: int) -> None:
        """Keep steps up to `step` and forget later ones, which a run resumed from iter_<step> publishes anew.

        Atomic (by rename). Nothing happens where the file ends before `step`.
        """
        if self.last_step > step:
            kept = {s: end for s, end in self._ends.items() if s <= step}
            self._cut(next(reversed(kept.values()), 0))
            self._ends = kept
            self._tensors = self._tensors if kept else None

    def _cut(self, end: int) -> None:
        with self.path.open("rb") as file:
            write_atomic(self.path, file.read(end))


def read(path: Path) -> Density[str]:
    """All whole lines of a file. Raises ValueError for a line that is damaged or out of place; a last line torn by a crash is left out."""
    return read_merged(path, str)


def read_merged(path: Path, merge: Callable[[str], Key]) -> Density[Key]:
    """`read`, with tensors for which `merge` gives the same added up, in the order of their first."""
    tensors: list[Tensor] = []
    places: dict[Key, int] = {}
    owner = np.zeros(0, np.int64)
    steps: list[int] = []
    rows: list[np.ndarray] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if not raw.endswith(b"\n"):
                log.warning("%s: the last line was cut off by a crash and is ignored", path)
                break
            if number == 0:
                tensors = _head(path, raw)
                owner = np.array([places.setdefault(merge(name), len(places)) for name, _ in tensors], np.int64)
                continue
            step, changed = _line(path, number, raw, len(tensors))
            if steps and step <= steps[-1]:
                raise ValueError(f"{path}: line {number} is of step {step}, after step {steps[-1]}")
            steps.append(step)
            rows.append(_added(changed, owner, len(places)))
    sizes = _added(np.array([size for _, size in tensors], np.int64), owner, len(places))
    merged = list(zip(places, sizes.tolist(), strict=True))
    return Density(merged, steps, np.array(rows, np.int64).reshape(len(steps), len(places)))


def _added(values: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """The sums of what belongs to each owner."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, owner, values)
    return sums


def _scan(path: Path) -> tuple[list[Tensor] | None, dict[int, int], int]:
    """The tensors (None in an empty file), where the line of each step ends, and where the last whole line ends."""
    tensors: list[Tensor] | None = None
    ends: dict[int, int] = {}
    at = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if not raw.endswith(b"\n"):
                break
            at += len(raw)
            if number == 0:
                tensors = _head(path, raw)
            else:
                found = _STEP.match(raw)
                if not found or int(found[1]) <= next(reversed(ends), -1):
                    raise ValueError(f"{path}: line {number} is not the record of a later step than the line before")
                ends[int(found[1])] = at
    return tensors, ends, at


def _head(path: Path, raw: bytes) -> list[Tensor]:
    try:
        return [(str(name), int(size)) for name, size in json.loads(raw)["tensors"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the first line does not name the tensors ({error})") from error


def _line(path: Path, number: int, raw: bytes, count: int) -> tuple[int, np.ndarray]:
    try:
        line = json.loads(raw)
        step, changed = int(line["step"]), np.array(line["changed"], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: line {number} is not the record of a step ({error})") from error
    if changed.shape != (count,):
        raise ValueError(f"{path}: line {number} does not have a count for each of {count} tensors")
    return step, changed


def _difference(old: Sequence[Tensor], new: Sequence[Tensor]) -> str:
    """The first tensor that is another one."""
    if len(old) != len(new):
        return f"{len(new)} instead of {len(old)}"
    a, b = next((a, b) for a, b in zip(old, new, strict=True) if a != b)
    return f"{b[0]} of {b[1]} elements instead of {a[0]} of {a[1]}"


def _encode(line: dict[str, object]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"
