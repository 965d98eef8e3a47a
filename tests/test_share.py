"""cluster.share in whole runs: ranks and engines on the same devices give the bits that they give on devices of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, Launched, Offspring, arguments, finish, launch, make_inputs

pytestmark = pytest.mark.e2e

MOVES = ("time/release_s", "time/reload_s", "time/offload_s", "time/restore_s")
NOT_OF_THE_RECIPE = ("time/", "sync/", "perf/", "engine/", "rollout/cpu")  # depend on the clock or on how many engines there are


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def recipe(inputs: Path) -> list[str]:
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl, samples: 2, temperature: 1}}}}"
    return ["run.deterministic=true", "run.steps=3", "run.eval_every=2", "run.save_every=2", evaluation, "cluster.cpus_per_rank=0.5"]


def swap(inputs: Path, name: str, *overrides: str) -> Launched:
    """A run whose trainer and engines have the memory in turn."""
    command = [sys.executable, "-m", "tests.swapping", "train", *arguments(inputs, name, "cluster.share=swap", *overrides)]
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=inputs, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    return finish(process, Offspring(process), inputs / "runs" / name)


def assert_done(run: Launched) -> None:
    assert run.code == 0, run.out + run.err
    assert run.offspring.count > 5 and run.offspring.left() == []


def bits(run: Launched) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run.run_dir / "hf").glob("*.safetensors"))}


def of_the_recipe(run: Launched) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(NOT_OF_THE_RECIPE)} for line in run.metrics]


@pytest.fixture(scope="module")
def apart(inputs: Path) -> Launched:
    """One rank and one engine, each with a device of its own."""
    run = launch(inputs, "apart", *recipe(inputs))
    assert_done(run)
    assert bits(run)
    return run


@pytest.mark.slow
def test_on_the_same_devices_side_by_side(apart: Launched, inputs: Path) -> None:
    run = launch(inputs, "split", "cluster.share=split", *recipe(inputs))
    assert_done(run)
    assert (bits(run), of_the_recipe(run)) == (bits(apart), of_the_recipe(apart))
    assert not any(move in line for line in run.metrics for move in MOVES)


@pytest.mark.slow
def test_two_ranks_and_two_engines_on_the_same_two_devices(apart: Launched, inputs: Path) -> None:
    two = ("cluster.roles.actor.devices=2", "cluster.roles.rollout.devices=2", "rollout.engines=2", "cluster.cpus_per_engine=0.5")
    run = launch(inputs, "split_two", "cluster.share=split", "rollout.mode=one_step_off", *recipe(inputs)[1:], *two)
    assert_done(run)
    assert all(line["mismatch/logprob_abs_diff"] < 1e-4 for line in run.metrics[1:])


def test_in_turn(apart: Launched, inputs: Path) -> None:
    """Weights go to the host and from there, whole, to an engine that was away; every move of a rank's memory is to the bit."""
    run = swap(inputs, "swap", *recipe(inputs))
    assert_done(run)
    assert (bits(run), of_the_recipe(run)) == (bits(apart), of_the_recipe(apart))
    assert [[move in line for move in MOVES] for line in run.metrics] == [[False, False, True, True]] + [[True] * 4] * 3
    log = (run.run_dir / "logs" / "driver.log").read_text()
    assert "its memory is released" in log and "engine 0 is dead" not in log


@pytest.mark.slow
def test_a_run_that_swaps_is_resumed(apart: Launched, inputs: Path) -> None:
    """The engine that starts holds model.path; it is brought to the checkpoint's weights when it gets its memory."""
    half = swap(inputs, "resumed", *recipe(inputs), "run.steps=2")
    assert_done(half)
    run = swap(inputs, "resumed", *recipe(inputs))
    assert_done(run)
    assert bits(run) == bits(apart)
