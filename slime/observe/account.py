"""ledger.jsonl: what became of every prompt, so that exactly once can be counted.

Line k is update k: {"step": k, "trained": "0-94,97", "dropped": {"filter": "95-96"}}, the ordinals whose fate that update settled. Dropped
ones stand with the batch that passed them over. What was drawn and is not settled yet is in no line.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from slime.observe.files import whole_lines, write_atomic

NAME = "ledger.jsonl"
_NAMED = 8  # ranges of ordinals that an error names at most


@dataclass(frozen=True, slots=True)
class Settled:
    """The prompts whose fate one update settled."""

    step: int
    trained: list[int]  # ordinals
    dropped: dict[int, str] = field(default_factory=dict)  # ordinal -> reason


@dataclass(frozen=True, slots=True)
class Account:
    """Counts of prompts over a whole run, each of which was settled once."""

    trained: int
    dropped: dict[str, int]  # reason -> count

    @property
    def settled(self) -> int:
        """All of them: the ordinals 0 to settled - 1."""
        return self.trained + sum(self.dropped.values())


def account(lines: Iterable[Settled]) -> Account:
    """Count, and check that every ordinal from 0 to the last one was trained or dropped, once. Raises ValueError naming those that are
    missing, and those that were settled twice with their updates."""
    steps: dict[int, int] = {}
    twice: dict[int, tuple[int, int]] = {}
    trained, dropped = 0, Counter[str]()
    for line in lines:
        trained += len(line.trained)
        dropped.update(line.dropped.values())
        for ordinal in (*line.trained, *line.dropped):
            if ordinal in steps:
                twice[ordinal] = (steps[ordinal], line.step)
            steps[ordinal] = line.step
    faults = [f"prompt {o} was settled twice, by updates {a} and {b}" for o, (a, b) in sorted(twice.items())[:_NAMED]]
    faults += ["..."] if len(twice) > _NAMED else []
    gaps = [(a + 1, b - 1) for a, b in pairwise([-1, *sorted(steps)]) if b > a + 1]
    if gaps:
        named = ", ".join(_range(a, b) for a, b in gaps[:_NAMED])
        faults.append(f"missing are the prompts {named}{', ...' if len(gaps) > _NAMED else ''}")
    if faults:
        raise ValueError("; ".join(faults))
    return Account(trained, dict(dropped))


class AccountLog:
    """Appends one durable line an update. One process writes a file; any number may read it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Carries on an existing file; a last line torn by a crash is cut off. Raises ValueError for any other damage."""
        self.path, self._last = path, 0
        self._write(read(path) if path.exists() else [])

    def append(self, line: Settled) -> None:
        """Record an update and fsync. Raises ValueError for one that is not the next, OSError where the disk refuses."""
        if line.step != self._last + 1:
            raise ValueError(f"{self.path}: update {self._last + 1} is next, update {line.step} cannot be recorded there")
        with self.path.open("ab") as file:
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())
        self._last = line.step

    def truncate(self, step: int) -> None:
        """Keep updates 1 to `step` and forget later ones: a run resumed from iter_<step> trains their prompts again.

        Atomic (by rename). Raises ValueError where the file ends before `step`.
        """
        if step > self._last:
            raise ValueError(f"{self.path} ends at update {self._last}, before step {step} that the run resumes from")
        self._write(read(self.path)[:step])

    def _write(self, lines: list[Settled]) -> None:
        write_atomic(self.path, b"".join(_encode(line) for line in lines))
        self._last = len(lines)


def read(path: Path) -> list[Settled]:
    """All whole lines of a file, in order; entry k is update k + 1. Raises ValueError for a line that is damaged or out of place."""
    lines = []
    for k, raw in enumerate(whole_lines(path), 1):
        try:
            row = json.loads(raw)
            dropped = {ordinal: reason for reason, ranges in row["dropped"].items() for ordinal in expand(ranges)}
            line = Settled(row["step"], expand(row["trained"]), dropped)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {k} is damaged ({error!r})") from error
        if line.step != k:
            raise ValueError(f"{path}: line {k} is not that of update {k}")
        lines.append(line)
    return lines


def compact(ordinals: Iterable[int]) -> str:
    """0-94,97: ascending whole numbers, runs of them by their ends."""
    runs: list[tuple[int, int]] = []
    for ordinal in sorted(ordinals):
        if runs and ordinal == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], ordinal)
        else:
            runs.append((ordinal, ordinal))
    return ",".join(_range(a, b) for a, b in runs)


def expand(ranges: str) -> list[int]:
    """What `compact` wrote. Raises ValueError for another text."""
    ordinals: list[int] = []
    for run in ranges.split(",") if ranges else []:
        first, _, last = run.partition("-")
        ordinals += range(int(first), int(last or first) + 1)
    return ordinals


def _encode(line: Settled) -> bytes:
    by_reason: Mapping[str, str] = {
        reason: compact(o for o, why in line.dropped.items() if why == reason) for reason in sorted(set(line.dropped.values()))
    }
    return json.dumps({"step": line.step, "trained": compact(line.trained), "dropped": by_reason}).encode() + b"\n"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
