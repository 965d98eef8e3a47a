import gzip
import json
import logging
import subprocess
import threading
from pathlib import Path

import pytest

from slime.observe.trace import Span, TraceFile, Tracer, idle_fraction, read_trace


def busy(start: float, end: float, name: str = "decode", process: str = "engine 0") -> Span:
    return Span(name, process, start, end)


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 1.0),
        ([busy(0, 10)], 0.0),
        ([busy(-5, 20)], 0.0),
        ([busy(0, 4), busy(6, 10)], 0.2),
        ([busy(0, 6), busy(4, 8)], 0.2),  # overlapping: counted once
        ([busy(0, 8), busy(2, 3), busy(1, 4, process="rank 0")], 0.2),  # nested
        ([busy(2, 4), busy(0, 1)], 0.7),  # in any order
        ([busy(0, 10, name="idle")], 1.0),  # another name
        ([busy(-3, -1), busy(11, 12), busy(10, 11)], 1.0),  # outside
        ([busy(3, 3)], 1.0),
        ([busy(0, 5, name="train"), busy(5, 10)], 0.0),
    ],
)
def test_idle_share_is_what_no_busy_span_covers(spans: list[Span], share: float) -> None:
    assert idle_fraction(spans, (0, 10), {"decode", "train"}) == pytest.approx(share, abs=1e-12)


def test_idle_share_of_wall_clock_times_is_exact_enough() -> None:
    t = 1.8e9
    assert idle_fraction([busy(t, t + 0.5), busy(t + 0.5, t + 0.95)], (t, t + 1), {"decode"}) == pytest.approx(0.05, abs=1e-6)


def test_a_tracer_keeps_blocks_that_raise_and_gives_each_span_once() -> None:
    tracer = Tracer("rank 0")
    with pytest.raises(KeyError), tracer.span("outer", step=3), tracer.span("inner"):
        raise KeyError
    inner, outer = tracer.drain()
    assert (inner.name, outer.name, outer.process, outer.args) == ("inner", "outer", "rank 0", {"step": 3})
    assert 0 <= inner.end_s - inner.start_s <= outer.end_s - outer.start_s < 5
    assert tracer.drain() == []


def test_threads_share_a_tracer() -> None:
    tracer = Tracer("rollout")
    threads = [threading.Thread(target=lambda: [tracer.add("x", 0, 1) for _ in range(500)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(tracer.drain()) == 2000


def events(path: Path, kind: str) -> list[dict]:
    return [e for e in read_trace(path) if e["ph"] == kind]


def test_the_file_is_a_whole_trace_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    trace = TraceFile(path)
    for step in range(1, 4):
        trace.append(step, [Span("train", "rank 0", 100.0 + step, 100.5 + step, {"tokens": 7}), busy(100.25 + step, 101 + step)])
        assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        subprocess.run(["gzip", "-t", path], check=True)  # one plain gzip stream, for any reader
        assert len(events(path, "X")) == 2 * step
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json.gz"]
    first = events(path, "X")[0]
    assert first == {"name": "train", "ph": "X", "pid": 1, "tid": 0, "ts": 101_000_000, "dur": 500_000, "args": {"step": 1, "tokens": 7}}
    names = {e["pid"]: e["args"]["name"] for e in events(path, "M") if e["name"] == "process_name"}
    assert names == {1: "rank 0", 2: "engine 0"}


def test_a_step_without_spans_leaves_a_trace(tmp_path: Path) -> None:
    TraceFile(tmp_path / "t.gz").append(0, [])
    assert read_trace(tmp_path / "t.gz") == []


def test_spans_that_cross_get_rows_of_their_own(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t.gz")
    spans = [Span(n, "rollout", a, b) for n, a, b in (("a", 0, 4), ("in a", 1, 2), ("crosses a", 3, 6), ("after a", 4, 5), ("b", 6, 7))]
    trace.append(1, reversed(spans))
    rows = {e["name"]: e["tid"] for e in events(tmp_path / "t.gz", "X")}
    assert rows == {"a": 0, "in a": 0, "crosses a": 1, "after a": 0, "b": 0}


def test_a_resumed_run_carries_its_trace_on(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    TraceFile(path).append(1, [busy(0, 1), busy(0, 1, process="rank 0")])
    TraceFile(path).append(2, [busy(2, 3, process="rank 0"), busy(2, 3, process="rank 1")])
    assert [(e["args"]["step"], e["pid"]) for e in events(path, "X")] == [(1, 1), (1, 2), (2, 2), (2, 3)]
    assert len(events(path, "M")) == 6  # each process is announced once


def test_a_damaged_trace_is_told_and_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.gz"
    TraceFile(path).append(1, [busy(0, 1)])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole trace"):
        read_trace(path)
    with caplog.at_level(logging.WARNING):
        TraceFile(path).append(2, [busy(2, 3)])
    assert "begins anew" in caplog.text
    assert [e["args"]["step"] for e in events(path, "X")] == [2]


def test_a_long_trace_is_rotated(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json.gz", rotate_bytes=300)
    for step in range(40):
        trace.append(step, [busy(step + i / 10, step + i / 10 + 0.0371 * i) for i in range(5)])
    older = sorted(tmp_path.glob("trace-*.json.gz"), key=lambda p: int(p.name[6:].split(".")[0]))
    assert len(older) > 2
    steps = [e["args"]["step"] for p in [*older, tmp_path / "trace.json.gz"] if p.exists() for e in events(p, "X")]
    assert steps == [s for s in range(40) for _ in range(5)]
