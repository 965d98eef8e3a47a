"""metrics.jsonl: the record of a run that everything else is drawn from.

Line k is update k with the evaluation after it; line 0 is the first evaluation alone. A line is one JSON object,
{"step": k, "<metric>": number or null, ...}; a value that is not finite is written as null and warned of, so that every
line stays valid JSON.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from slime.observe.files import whole_lines, write_atomic

log = logging.getLogger(__name__)

Line = dict[str, float | None]


class MetricsLog:
    """Appends one durable line a step. One process writes a file; any number may read it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Carries on an existing file; a last line torn by a crash is cut off. Raises ValueError for any other damage."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._next = 0
        lines = read(path) if path.exists() else []
        self._write(lines)

    @property
    def next_step(self) -> int:
        """The step that the next `append` records."""
        return self._next

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `step` and fsync. Raises ValueError for a step that is not the next one, OSError where the disk refuses."""
        if step != self._next:
            raise ValueError(f"{self.path}: line {self._next} is next, step {step} cannot be recorded there (truncate first on a resume)")
        line: Line = {"step": step}
        for name, value in metrics.items():
            assert name != "step", "a metric cannot be named step"
            line[name] = float(value) if math.isfinite(value) else None
        bad = [f"{name}={metrics[name]}" for name, value in line.items() if value is None]
        if bad:
            log.warning("step %d: not finite, recorded as null: %s", step, ", ".join(bad))
        with self.path.open("ab") as file:
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())
        self._next = step + 1

    def truncate(self, step: int) -> None:
        """Keep lines 0 to `step` and forget later ones: a run resumed from iter_<step> records step + 1 next.

        Atomic (by rename). Raises ValueError where the file ends before `step`.
        """
        if step >= self._next:
            raise ValueError(f"{self.path} ends at step {self._next - 1}, before step {step} that the run resumes from")
        self._write(read(self.path)[: step + 1])

    def _write(self, lines: list[Line]) -> None:
        write_atomic(self.path, b"".join(_encode(line) for line in lines))
        self._next = len(lines)


def _encode(line: Line) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def read(path: Path) -> list[Line]:
    """All whole lines of a file, in order; entry k is step k. Raises ValueError for a line that is damaged or out of place."""
    lines: list[Line] = []
    for k, raw in enumerate(whole_lines(path)):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{path}: line {k} is not JSON ({error})") from error
        if not isinstance(line, dict) or line.get("step") != k:
            raise ValueError(f"{path}: line {k} is not the record of step {k}")
        lines.append(line)
    return lines
