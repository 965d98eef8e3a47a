"""Data files read by row: opened once, indexed, never held in memory whole."""

import bisect
import json
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_CHUNK = 1 << 24  # bytes scanned for line ends at a time
_BATCH = 4096  # parquet rows decoded at a time


class Rows(Protocol):
    """A file as a sequence of rows."""

    path: Path

    def __len__(self) -> int: ...

    def row(self, i: int) -> dict[str, Any]:
        """Row i. Raises ValueError naming the file and line of a row that cannot be read."""
        ...


def open_rows(path: str, knob: str) -> Rows:
    """Open a .jsonl or .parquet file. Raises ValueError naming `knob` where it is missing, empty, or of another kind."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{knob}={path}: no such file")
    kinds: dict[str, type[JsonlRows] | type[ParquetRows]] = {".jsonl": JsonlRows, ".parquet": ParquetRows}
    if file.suffix not in kinds:
        raise ValueError(f"{knob}={path}: slime reads {' and '.join(kinds)} files")
    rows = kinds[file.suffix](file)
    if len(rows) == 0:
        raise ValueError(f"{knob}={path}: the file has no rows")
    return rows


class JsonlRows:
    """One JSON object a line; blank lines are no rows. The index is 8 bytes a row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = _line_starts(path)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, i: int) -> dict[str, Any]:
        self._file.seek(int(self._starts[i]))
        try:
            row = json.loads(self._file.readline())
        except ValueError as error:
            raise ValueError(f"{self.path}, line {self._line(i)}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {self._line(i)}: a row is an object with columns, not {type(row).__name__}")
        return row

    def _line(self, i: int) -> int:
        """Number of the line that holds row i, blank ones counted, from 1."""
        before, line = int(self._starts[i]), 1
        with self.path.open("rb") as file:
            while before > 0 and (chunk := file.read(min(_CHUNK, before))):
                line += chunk.count(b"\n")
                before -= len(chunk)
        return line


class ParquetRows:
    """A parquet file, decoded once, row group by row group, into an unlinked temporary file that is mapped into memory.

    A shuffled epoch reads rows in any order, and a row of parquet is read by decoding its whole row group.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as parquet, tempfile.NamedTemporaryFile(prefix="slime-rows-") as file:
                with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
                    for batch in parquet.iter_batches(batch_size=_BATCH):
                        writer.write_batch(batch)
                file.flush()
                self._file = pa.ipc.open_file(pa.memory_map(file.name))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a parquet file that can be read ({error})") from error
        except OSError as error:
            raise ValueError(
                f"{path}: not a parquet file that can be read, or {tempfile.gettempdir()} is full ({error}); set TMPDIR"
            ) from error
        sizes = [self._file.get_batch(b).num_rows for b in range(self._file.num_record_batches)]
        self._ends = np.cumsum(sizes, dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, i: int) -> dict[str, Any]:
        batch = bisect.bisect_right(self._ends, i)
        first = self._ends[batch - 1] if batch else 0
        return self._file.get_batch(batch).slice(i - first, 1).to_pylist()[0]


def _line_starts(path: Path) -> np.ndarray:
    """uint64 offsets of the lines that are not blank."""
    starts, lengths, offset = [np.zeros(1, np.uint64)], path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")).astype(np.uint64) + np.uint64(offset + 1))
            offset += len(chunk)
    found = np.concatenate(starts)
    ends = np.append(found[1:], np.uint64(lengths))
    found, ends = found[ends > found], ends[ends > found]
    with path.open("rb") as file:
        blank = [k for k in np.flatnonzero(ends - found <= 3) if not _read(file, int(found[k]), int(ends[k])).strip()]
    return np.delete(found, blank)


def _read(file: Any, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
