"""Where the time of a step goes: spans measured in every process, one trace file a run.

A process collects spans with its `Tracer` and hands them over with `drain()`; the driver appends those of a step to
`trace.json.gz` (Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing open).

    tracer = Tracer("rank 0")
    with tracer.span("forward_backward", step=3):
        ...
    trace.append(3, tracer.drain())
"""

import contextlib
import gzip
import json
import logging
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime.observe.files import write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a process did from `start_s` to `end_s` (seconds since 1970)."""

    name: str  # what: forward_backward, generate, publish, ...
    process: str  # who: driver, rollout, rank 0, engine 0, ...
    start_s: float
    end_s: float
    args: dict[str, Any] = field(default_factory=dict)  # shown beside the span; JSON values


class Tracer:
    """Collects the spans of one process; threads and coroutines may share it."""

    def __init__(self, process: str) -> None:
        self.process = process
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record the block, also when it raises. The length is read from a clock that is never set back."""
        start_s, begun = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self.add(name, start_s, start_s + time.perf_counter() - begun, **args)

    def add(self, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Record a span that was timed elsewhere (seconds since 1970); one that a clock set back has turned around has no length."""
        with self._lock:
            self._spans.append(Span(name, self.process, start_s, max(start_s, end_s), args))

    def drain(self) -> list[Span]:
        """The spans recorded since the last call, in the order in which they ended."""
        with self._lock:
            spans, self._spans = self._spans, []
        return spans


def idle_fraction(spans: Iterable[Span], window: tuple[float, float], busy_names: Collection[str]) -> float:
    """Share of `window` (start_s, end_s) that no span named in `busy_names` covers, in any process: 0.0 to 1.0.

    With the names under which engines decode and ranks compute, over a step, it is the share of the step in which
    neither happens.
    """
    start_s, end_s = window
    assert end_s > start_s, f"empty window {window}"
    clipped = ((max(s.start_s, start_s), min(s.end_s, end_s)) for s in spans if s.name in busy_names)
    busy_s, covered_to = 0.0, start_s
    for begin, end in sorted(c for c in clipped if c[1] > c[0]):
        busy_s += max(0.0, end - max(begin, covered_to))
        covered_to = max(covered_to, end)
    return max(0.0, 1.0 - busy_s / (end_s - start_s))


class TraceFile:
    """The trace of a run, written whole and atomically after every step; an existing file is carried on.

    One row group a process; spans of a process that overlap without nesting (coroutines) get further rows. The compressed
    text stays in memory (about 20 bytes a span); beyond `rotate_bytes` the file is renamed to trace-<n>.json.gz and a new
    one begins.
    """

    _head, _tail = b'{"displayTimeUnit":"ms","traceEvents":[\n', b"\n]}\n"

    def __init__(self, path: Path, rotate_bytes: int = 64 << 20) -> None:
        self.path = path
        self.rotate_bytes = rotate_bytes
        self._begin()
        if path.exists():
            self._carry_on()

    def _begin(self) -> None:
        self._zip = zlib.compressobj(wbits=31)  # 31: with a gzip header and trailer
        self._body = bytearray(self._zip.compress(self._head))
        self._empty = True
        self._pids: dict[str, int] = {}
        self._lanes: dict[str, list[list[float]]] = {}  # process -> rows, each the ends of its open spans

    def _carry_on(self) -> None:
        try:
            events = read_trace(self.path)
        except ValueError as error:
            log.warning("%s; the trace begins anew", error)
            return
        for event in events:
            if event["ph"] == "M" and event["name"] == "process_name":
                self._pids[event["args"]["name"]] = event["pid"]
        self._add(events)

    def append(self, step: int, spans: Iterable[Span]) -> None:
        """Add the spans of `step` and write the file. Raises OSError where the disk refuses."""
        events: list[dict[str, Any]] = []
        for span in sorted(spans, key=lambda s: (s.start_s, -s.end_s)):
            if span.process not in self._pids:
                self._pids[span.process] = len(self._pids) + 1
                events += self._announce(span.process)
            events.append(
                {
                    "name": span.name,
                    "ph": "X",
                    "pid": self._pids[span.process],
                    "tid": self._row(span),
                    "ts": round(span.start_s * 1e6),  # microseconds
                    "dur": round((span.end_s - span.start_s) * 1e6),
                    "args": {"step": step, **span.args},
                }
            )
        self._add(events)
        tail = self._zip.copy()
        write_atomic(self.path, bytes(self._body) + tail.compress(self._tail) + tail.flush())
        if len(self._body) > self.rotate_bytes:
            n = sum(1 for _ in self.path.parent.glob("trace-*.json.gz"))
            self.path.rename(self.path.with_name(f"trace-{n}.json.gz"))
            self._begin()

    def _announce(self, process: str) -> list[dict[str, Any]]:
        pid = self._pids[process]
        return [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": process}},
            {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}},
        ]

    def _row(self, span: Span) -> int:
        """The first row of the span's process on which it lies free or wholly inside another span."""
        rows = self._lanes.setdefault(span.process, [])
        for i, open_ends in enumerate(rows):
            while open_ends and open_ends[-1] <= span.start_s:
                open_ends.pop()
            if not open_ends or span.end_s <= open_ends[-1]:
                open_ends.append(span.end_s)
                return i
        rows.append([span.end_s])
        return len(rows) - 1

    def _add(self, events: list[dict[str, Any]]) -> None:
        if not events:
            return
        text = ",\n".join(json.dumps(e, separators=(",", ":")) for e in events)
        self._body += self._zip.compress(("" if self._empty else ",\n").encode() + text.encode())
        self._body += self._zip.flush(zlib.Z_SYNC_FLUSH)
        self._empty = False


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The trace events of a file. Raises ValueError naming a file that is not whole."""
    try:
        return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole trace ({error})") from error
