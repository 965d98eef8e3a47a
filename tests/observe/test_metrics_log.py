import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from slime.observe.metrics import MetricsLog, read


def three(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(3):
        log.append(step, {"reward/mean": step / 4})
    return log


def test_line_k_is_update_k(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    three(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": k, "reward/mean": k / 4} for k in range(3)]
    assert read(path)[2] == {"step": 2, "reward/mean": 0.5}


@pytest.mark.parametrize("step", [0, 2, 4, -1])
def test_a_step_out_of_order_is_refused(tmp_path: Path, step: int) -> None:
    log = three(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(ValueError, match=f"line 3 is next, step {step} cannot be recorded"):
        log.append(step, {})
    assert (tmp_path / "m").read_bytes() == before


def test_values_that_are_not_finite_become_null_and_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        log.append(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": True, "f": np.int64(3)})
    line = json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 0, "a": None, "b": None, "c": None, "d": 0.5, "e": 1, "f": 3}
    assert "step 0: not finite, recorded as null: a=nan, b=inf, c=-inf" in caplog.text


def test_what_is_no_number_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        MetricsLog(tmp_path / "m").append(0, {"a": "0.5"})  # type: ignore[dict-item]
    assert read(tmp_path / "m") == []


def test_a_resumed_run_forgets_what_it_trains_again(tmp_path: Path) -> None:
    three(tmp_path / "m")
    log = MetricsLog(tmp_path / "m")
    assert log.next_step == 3
    log.truncate(1)
    log.append(2, {"reward/mean": 9.0})
    assert [line["reward/mean"] for line in read(tmp_path / "m")] == [0.0, 0.25, 9.0]
    log.truncate(2)  # nothing to forget
    assert log.next_step == 3
    with pytest.raises(ValueError, match="ends at step 2, before step 3"):
        log.truncate(3)


def test_a_torn_last_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    line = whole.splitlines(keepends=True)[2]
    for cut in range(1, len(line)):
        (tmp_path / "m").write_bytes(whole[:-cut])
        assert len(read(tmp_path / "m")) == 2
        log = MetricsLog(tmp_path / "m")
        log.append(2, {"reward/mean": 0.5})
        assert (tmp_path / "m").read_bytes() == whole
    assert "cut off by a crash" in caplog.text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"step": 0}\nnonsense\n{"step": 2}\n', "line 1 is not JSON"),
        ('{"step": 0}\n{"step": 2}\n', "line 1 is not the record of step 1"),
        ('{"step": 0}\n{"step": 0}\n', "line 1 is not the record of step 1"),
        ("[0]\n", "line 0 is not the record"),
        ("\n\n", "line 0 is not JSON"),
    ],
)
def test_any_other_damage_is_an_error(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / "m").write_text(content)
    with pytest.raises(ValueError, match=fault):
        MetricsLog(tmp_path / "m")
    assert (tmp_path / "m").read_text() == content
