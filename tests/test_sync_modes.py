"""Whole runs under the weight channel: full and delta train alike, small steps are thin deltas, a killed run catches up first."""

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from tests.launch import Launched, launch, make_inputs, start, wait_for_line

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NOT_OF_THE_RECIPE = ("time/", "sync/", "perf/", "engine/", "rollout/cpu")  # depend on the clock or on how weights travel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def assert_done(run: Launched) -> None:
    assert run.code == 0, run.out + run.err


def hf_bytes(run: Launched) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((run.run_dir / "hf").glob("*.safetensors"))}
    assert found
    return found


def of_the_recipe(run: Launched) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.startswith(NOT_OF_THE_RECIPE)} for line in run.metrics]


def spans(run: Launched, name: str) -> list[dict[str, Any]]:
    """Of the trace, in their order."""
    events = json.loads(gzip.decompress((run.run_dir / "trace.json.gz").read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    return sorted((event for event in events if event.get("name") == name), key=lambda event: event["ts"])


def test_full_and_delta_give_the_same_bits(inputs: Path) -> None:
    runs = {mode: launch(inputs, mode, "run.deterministic=true", "run.steps=3", f"sync.mode={mode}") for mode in ("delta", "full")}
    for run in runs.values():
        assert_done(run)
        assert [line.get("sync/version") for line in run.metrics[1:]] == [1, 2, 3]
    assert hf_bytes(runs["delta"]) == hf_bytes(runs["full"])
    assert of_the_recipe(runs["delta"]) == of_the_recipe(runs["full"])
    whole = sum(tensor.nbytes for tensor in load_file(inputs / "model" / "model.safetensors").values())
    for delta, full in zip(runs["delta"].metrics[1:], runs["full"].metrics[1:], strict=True):
        assert full["sync/wire_bytes"] == whole > delta["sync/wire_bytes"] > 0
        assert "sync/density" in delta and "sync/density" not in full


def test_small_steps_in_bfloat16_are_thin_deltas(tmp_path: Path) -> None:
    """A step of 5e-6 moves weights of about 0.1, whose neighbours are 5e-4 away, by one in a hundred."""
    inputs = make_inputs(tmp_path, dtype="bf16")
    bounds = ("observe.mismatch_stop=0.05",)
    run = launch(inputs, "thin", "run.steps=5", "model.dtype=bf16", "trainer.lr=5e-6", *bounds)
    assert_done(run)
    lines = run.metrics[1:]
    assert [line["sync/version"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(0.005 < line["sync/density"] < 0.03 for line in lines), [line["sync/density"] for line in lines]
    assert all(line["sync/ratio"] > 30 and line["sync/healed"] == 0 for line in lines)
    assert all(line["mismatch/logprob_abs_diff"] < 0.01 for line in lines)
    whole = sum(tensor.numel() for tensor in load_torch(inputs / "model" / "model.safetensors").values())
    kept = [json.loads(line) for line in (run.run_dir / "density.jsonl").read_text().splitlines()]
    counts = [sum(line["changed"]) / whole for line in kept if "changed" in line]
    assert counts == pytest.approx([line["sync/density"] for line in lines])


def test_a_killed_run_publishes_what_it_resumes_from_before_it_generates(inputs: Path) -> None:
    """Engines load the model directory, which the trainer has left far behind."""
    run_dir = inputs / "runs" / "killed"
    process, offspring = start(inputs, "killed", "run.steps=40", "run.save_every=2")
    wait_for_line(run_dir / "latest_checkpointed_iteration.txt", 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert offspring.left(60) == []
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    run = launch(inputs, "killed", f"run.steps={saved + 2}", "run.save_every=2")
    assert_done(run)
    assert [line["step"] for line in run.metrics] == list(range(saved + 3))
    assert [line["sync/version"] for line in run.metrics[1:]] == list(range(1, saved + 3))
    assert all(line["mismatch/logprob_abs_diff"] < 1e-4 for line in run.metrics[1:]), "engines generate with the trainer's weights"
    begun = spans(run, "adopt")[-1]["ts"]
    first = next(event for event in spans(run, "publish") if event["ts"] > begun)
    assert first["args"]["version"] == saved
    assert all(event["ts"] > first["ts"] + first["dur"] for event in spans(run, "engine") if event["ts"] > begun)
    state = json.loads((run_dir / f"iter_{saved + 2:07d}" / "state.json").read_text())
    assert state["version"]["epoch"] == 1 and state["version"]["number"] == saved + 2
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "model", run_dir / "hf"))
    assert any(not np.array_equal(before[name], after[name]) for name in before)
