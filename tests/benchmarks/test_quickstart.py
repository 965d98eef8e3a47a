"""Every figure of the bar decides the exit code."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import quickstart
from benchmarks.quickstart import Row, failures, read_figures, table

GOOD = Row("quickstart", 0, False, 0, 280.0, 0.4, 0.9, 9.0, 0.04, 100.0, 9e-8)
CONTROL = replace(GOOD, control=True, after=0.42)


@pytest.mark.parametrize("row", [GOOD, CONTROL, replace(GOOD, recipe="quickstart_bf16", mismatch_max=3e-4)])
def test_a_good_run_holds_the_bar(row):
    assert failures(row) == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (replace(GOOD, after=0.69), "rise in points 29, to be at least 30"),
        (replace(CONTROL, after=0.46), "rise in points 6, to be below 5"),
        (replace(GOOD, wall_s=301), "wall s 301, to be at most 300"),
        (replace(GOOD, mismatch_max=1e-4), "largest mismatch 0.0001, to be below 0.0001 at every step"),
        (replace(GOOD, recipe="quickstart_bf16", mismatch_max=0.0011), "largest mismatch 0.0011, to be below 0.001"),
        (replace(GOOD, idle_frac=0.051), "median idle share 0.051, to be at most 0.05"),
        (replace(GOOD, mismatch_max=None), "largest mismatch not recorded"),
        (replace(GOOD, idle_frac=float("nan")), "median idle share nan"),
        (replace(GOOD, exit_code=5), "exit code 5"),
    ],
)
def test_each_figure_can_miss_it(row, text):
    (failure,) = failures(row)
    assert failure.startswith(text)


def recorded(directory, drifts):
    summary = {"eval_before": {"heldout": 0.4}, "eval_after": {"heldout": 0.9}}
    (directory / "summary.json").write_text(json.dumps(summary))
    steps = [{"time/step_s": 9.0 + k, "rollout/cpu_us_per_token": 100.0, **({"time/idle_frac": 0.01 * k} if k else {})} for k in range(3)]
    lines = [{"eval/heldout/accuracy": 0.4}, *({**step, **drift} for step, drift in zip(steps, drifts, strict=True))]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("last", "worst"), [({"mismatch/logprob_abs_diff": 2e-7}, 3e-7), ({"mismatch/logprob_abs_diff": None}, None), ({}, None)]
)
def test_figures_are_read_from_a_runs_directory(tmp_path, last, worst):
    recorded(tmp_path, [{"mismatch/logprob_abs_diff": 1e-7}, {"mismatch/logprob_abs_diff": 3e-7}, last])
    row = Row("quickstart", 0, False, 0, 280.0)
    read_figures(row, tmp_path)
    assert row == replace(GOOD, step_s=10.0, idle_frac=0.015, mismatch_max=worst)


@pytest.mark.parametrize(("wall_s", "code"), [(280.0, 0), (301.0, 1)])
def test_the_table_is_whole_and_the_results_are_json(tmp_path, monkeypatch, capsys, wall_s, code):
    monkeypatch.setattr(quickstart, "RESULTS", tmp_path)
    monkeypatch.setattr(quickstart, "run", lambda recipe, seed, control: replace(CONTROL if control else GOOD, seed=seed, wall_s=wall_s))
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--seeds", "3", "4"])
    monkeypatch.setenv("COLUMNS", "80")
    assert quickstart.main() == code
    out = capsys.readouterr().out
    assert "…" not in out and all(column.header in out for column in table([GOOD]).columns)
    assert ("missed  seed 4, true rewards: wall s 301" in out) == bool(code)
    found = json.loads((tmp_path / "quickstart.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [3, 4, 3] and found["runs"][0]["points"] == pytest.approx(50)
    assert len(found["missed"]) == 3 * code


def test_a_run_that_fails_is_a_row_without_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 3))
    row = quickstart.run("quickstart", 0, control=False)
    assert row.exit_code == 3 and row.points is None and len(failures(row)) == 4
