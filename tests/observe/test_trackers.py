import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from slime.config import ObserveConfig
from slime.observe.trackers import Trackers, start_trackers


class Flaky:
    """A dashboard whose connection breaks at a given step."""

    errors: tuple[type[Exception], ...] = (ConnectionError,)

    def __init__(self, name: str, breaks_at: int, error: Exception) -> None:
        self.name, self.breaks_at, self.error = name, breaks_at, error
        self.steps: list[int] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self.breaks_at:
            raise self.error
        self.steps.append(step)

    def id(self) -> str:
        return f"{self.name}-id"

    def close(self) -> None:
        if self.breaks_at < 100:
            raise self.error


def test_a_tracker_that_fails_is_told_once_counted_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Flaky("good", 100, ConnectionError()), Flaky("bad", 2, ConnectionError("no route"))
    trackers = Trackers([bad, good])
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            trackers.log(step, {"a": 1.0})
    assert (bad.steps, good.steps, trackers.failed) == ([0, 1], [0, 1, 2, 3, 4], {"bad": 3})
    assert [r.getMessage() for r in caplog.records] == ["bad failed at step 2 and gets nothing more (metrics.jsonl has it all): no route"]
    assert trackers.ids() == {"bad": "bad-id", "good": "good-id"}
    trackers.close()
    assert "bad could not be closed: no route" in caplog.text and "bad lacks 3 steps" in caplog.text


def test_a_bug_in_a_tracker_is_not_taken_for_a_lost_connection() -> None:
    with pytest.raises(ZeroDivisionError):
        Trackers([Flaky("bad", 0, ZeroDivisionError())]).log(0, {})


def test_nothing_is_started_that_is_off(tmp_path: Path) -> None:
    trackers = start_trackers(ObserveConfig(wandb="off"), tmp_path, "r", {}, ids={}, first_step=0)
    trackers.log(0, {"a": 1.0})
    trackers.close()
    assert trackers.ids() == {} and list(tmp_path.iterdir()) == []


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = ObserveConfig(wandb="off", tensorboard=True)
    for first, steps, value in ((0, range(5), 1.0), (3, range(3, 6), 2.0)):
        trackers = start_trackers(cfg, tmp_path, "r", {}, ids={}, first_step=first)
        for step in steps:
            trackers.log(step, {"reward/mean": value, "train/kl": math.nan})
        trackers.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("reward/mean")] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_tracker_that_cannot_start_names_its_knob(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(ValueError, match=r"observe\.tensorboard=true cannot start.*Use observe\.tensorboard=false"):
        start_trackers(ObserveConfig(wandb="off", tensorboard=True), tmp_path, "r", {}, ids={}, first_step=0)


def wandb_records(content: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, parts with crc, length and type) after 7 bytes."""
    records, at, whole = [], 7, b""
    while at + 7 <= len(content):
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        if kind in (1, 4):  # the whole record, or its last part
            records.append(whole)
            whole = b""
        at += 7 + length
        if (left := -at % 32768) < 7:
            at += left
    return records


@pytest.mark.parametrize(("named", "project"), [(None, "slime"), ("", "slime"), ("mine", "mine")])
def test_wandbs_own_variable_names_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, project: str) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if named is not None:
        monkeypatch.setenv("WANDB_PROJECT", named)
    asked: list[str] = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None)
    monkeypatch.setattr("wandb.init", lambda **given: asked.append(given["project"]) or run)
    start_trackers(ObserveConfig(), tmp_path, "r", {}, ids={}, first_step=0)
    assert asked == [project]


@pytest.mark.e2e
def test_wandb_offline_needs_no_network_and_keeps_its_id(tmp_path: Path, capfd) -> None:
    from wandb.proto import wandb_internal_pb2

    cfg = ObserveConfig()
    ids: dict[str, str] = {}
    for first in (0, 2):
        trackers = start_trackers(cfg, tmp_path, "a-run", {"run": {"seed": 3}}, ids=ids, first_step=first)
        for step in range(first, first + 3):
            trackers.log(step, {"reward/mean": step / 2})
        assert not ids or trackers.ids() == ids
        ids = trackers.ids()
        trackers.close()
        assert trackers.failed == {}
    assert capfd.readouterr().out == ""  # stdout is for training
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{ids['wandb']}.wandb"))
    assert files
    rows, metrics = [], []
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("history"):
                row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                rows.append((row["step"], row["reward/mean"]))
            if record.HasField("metric"):
                metrics.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
    assert rows[-3:] == [(2, 1.0), (3, 1.5), (4, 2.0)]
    assert ("step", "") in metrics
    assert any(step_metric == "step" for _, step_metric in metrics)
