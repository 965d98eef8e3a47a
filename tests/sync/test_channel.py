"""The channel's order of calls, and what it does when one fails."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from slime.config import SyncConfig
from slime.sync.channel import Channel
from slime.types import WeightVersion

VERSION = WeightVersion(epoch=2, number=0, run_id="r")


class Log:
    """Publisher and receivers that write down what happens."""

    def __init__(self, buckets: int = 3, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.buckets, self.fails = buckets, fails

    def weights(self, version: WeightVersion, bucket_bytes: int) -> Iterator[Any]:
        assert bucket_bytes == 4 << 20
        for k in range(self.buckets):
            self._log("gather", k)
            yield k

    def begin(self, label: str, timeout_s: float) -> None:
        self._log("begin", label)

    def load(self, bucket: Any, label: str | None, timeout_s: float) -> int:
        assert 0 < timeout_s <= 10
        self._log("load", bucket, label)
        return 100

    def commit(self, label: str, timeout_s: float) -> None:
        self._log("commit", label)

    def relabel(self, label: str, timeout_s: float) -> None:
        self._log("relabel", label)

    def _log(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise RuntimeError(f"{self.fails} failed")


def channel(publisher: Log | None, receivers: Log | None) -> Channel:
    return Channel(SyncConfig(bucket_mb=4, timeout_s=10), publisher, receivers, VERSION)


def test_order_and_metrics() -> None:
    log = Log()
    made = channel(log, log)
    metrics = made.publish(5)
    assert log.calls == [
        ("gather", 0),
        ("begin", "r/2/5"),
        ("gather", 1),
        ("load", 0, None),
        ("gather", 2),
        ("load", 1, None),
        ("load", 2, "r/2/5"),
        ("commit", "r/2/5"),
    ]
    assert metrics["sync/version"] == 5 and metrics["sync/wire_bytes"] == 300
    assert {"sync/pause_s", "sync/commit_s", "sync/stage_s", "time/sync_s"} <= set(metrics)
    assert metrics["time/sync_s"] >= metrics["sync/pause_s"] >= metrics["sync/stage_s"]
    assert [span.name for span in made.spans()] == ["gather", "pause"] and made.spans() == []


def test_a_version_that_is_held_is_not_sent_again() -> None:
    log = Log()
    made = channel(log, log)
    made.publish(5)
    count = len(log.calls)
    assert made.publish(5) == {} and len(log.calls) == count
    made.publish(6)
    assert len(log.calls) == 2 * count


@pytest.mark.parametrize("fails", ["gather", "begin", "load", "commit"])
def test_after_a_failure_no_version_counts(fails: str) -> None:
    log = Log()
    made = channel(log, log)
    made.publish(5)
    log.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        made.publish(6)
    log.fails = ""
    log.calls.clear()
    made.publish(5)
    assert ("commit", "r/2/5") in log.calls, "the old version must be sent again"


def test_engines_keep_what_they_loaded_without_a_trainer() -> None:
    log = Log()
    made = channel(None, log)
    assert made.publish(0) == {"sync/version": 0.0} and log.calls == [("relabel", "r/2/0")]
    assert made.publish(0) == {}


def test_nothing_is_published_without_engines() -> None:
    assert channel(Log(), None).publish(3) == {}


def test_deadline_names_its_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    made = channel(log, log)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(TimeoutError, match=r"publishing weights r/2/5: not in every engine after 10 s \(sync.timeout_s\)"):
        made.publish(5)
