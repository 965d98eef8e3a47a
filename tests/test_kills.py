"""Promise 3: a run killed anywhere and started again by the same command gives the bits of one that nobody disturbed.

One kill is in tests/test_train.py.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart.make_task import make_task
from slime.observe.metrics import read
from tests.killing import VICTIMS, Kill, plan_of, survive
from tests.launch import Launched, make_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NOT_OF_THE_RECIPE = ("time/", "sync/", "perf/", "engine/", "rollout/cpu")  # the clock, and who answered
KILLS = int(os.environ.get("SLIME_TEST_KILLS", "40"))
SEED = int(os.environ.get("SLIME_TEST_KILL_SEED", "0"))
PER_RUN = 5
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model, which knows nothing, and its prompts; any model can raise the reward of these runs."""
    folder = tmp_path_factory.mktemp("quickstart")
    make_task(folder, seed=0)
    rows = (folder / "heldout.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(rows[:64]))
    return folder


def recipe(inputs: Path, steps: int, mode: str) -> list[str]:
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl}}}}"
    return [
        *("run.deterministic=true", f"run.steps={steps}", "run.save_every=2", "run.eval_every=5", "run.max_restarts=8"),
        *(f"rollout.mode={mode}", evaluation, "rollout.filter=tests.rollout.generate_functions:drops_every_fifth"),
    ]


def undisturbed(inputs: Path, name: str, overrides: list[str]) -> tuple[Launched, int, float]:
    """A run that nobody kills, the requests of its saves, and how long it takes to start."""
    begun = time.monotonic()
    os.environ["SLIME_TEST_COUNT"] = str(inputs / f"{name}.calls")
    try:
        run, _ = survive(inputs, name, [], *overrides)
    finally:
        del os.environ["SLIME_TEST_COUNT"]
    assert run.code == 0, run.out
    return run, int((inputs / f"{name}.calls").read_text()), time.monotonic() - begun - run.summary["wall_s"]


def of_the_recipe(run: Launched) -> list[dict[str, Any]]:
    lines = read(run.run_dir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(NOT_OF_THE_RECIPE)} for line in lines]


def trainer_tensors(run: Launched) -> dict[str, bytes]:
    """Every tensor of the last checkpoint's trainer state (weights, main weights, moments, RNG), by name."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    last = (run.run_dir / "latest_checkpointed_iteration.txt").read_text().strip()
    state = _load_state_dict_from_keys(storage_reader=FileSystemReader(run.run_dir / f"iter_{int(last):07d}" / "trainer"))

    def flat(value: Any, name: str) -> dict[str, bytes]:
        if isinstance(value, dict):
            return {k: v for key, one in value.items() for k, v in flat(one, f"{name}.{key}").items()}
        if isinstance(value, torch.Tensor):
            return {name: bytes(value.contiguous().view(torch.uint8).numpy()) if value.numel() else b""}
        return {}

    tensors = flat(state, "")
    assert len(tensors) > 20
    return tensors


def hf_bytes(run: Launched) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.run_dir / "hf").glob("*.safetensors"))}


def assert_the_same_run(run: Launched, reference: Launched) -> None:
    """Weights, optimizer and metrics to the bit, and every prompt settled exactly once."""
    assert run.code == 0, run.out[-6000:]
    assert hf_bytes(run) == hf_bytes(reference) and hf_bytes(run)
    ours, theirs = trainer_tensors(run), trainer_tensors(reference)
    assert ours.keys() == theirs.keys() and [name for name in ours if ours[name] != theirs[name]] == []
    assert of_the_recipe(run) == of_the_recipe(reference)
    settled = [json.loads(line) for line in (run.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert settled == [json.loads(line) for line in (reference.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert run.offspring.left(30.0) == []


@pytest.mark.parametrize("mode", ["sync", "one_step_off"])
def test_a_run_killed_a_few_times_gives_the_same_bits(inputs: Path, mode: str) -> None:
    overrides = recipe(inputs, STEPS, mode)
    reference, calls, _ = undisturbed(inputs, f"few_{mode}", overrides)
    plan = [Kill("driver", call=calls // 3), Kill("rank", line=6), Kill("engine", line=9)]
    run, done = survive(inputs, f"few_{mode}_killed", plan, *overrides)
    assert done == plan
    log = (run.run_dir / "logs" / "driver.log").read_text()
    assert "restart 1 of 8" in log, "the run did not start again by itself"
    assert "engine 0 is dead" in log
    assert_the_same_run(run, reference)


@pytest.mark.kills
@pytest.mark.parametrize("mode", ["sync", "one_step_off"])
def test_a_run_killed_at_many_random_moments_gives_the_same_bits(quickstart: Path, mode: str) -> None:
    """SLIME_TEST_KILLS moments, over as many runs as it takes; SLIME_TEST_KILL_SEED draws others."""
    inputs = quickstart
    sizes = ("rollout.prompts_per_step=24", "rollout.samples_per_prompt=8", "rollout.max_response_tokens=8", "data.max_prompt_tokens=32")
    overrides = [*recipe(inputs, STEPS, mode), *sizes]
    reference, calls, start_s = undisturbed(inputs, f"many_{mode}", overrides)
    done: list[Kill] = []
    number = 0
    while len(done) < KILLS:
        plan = plan_of(1000 * SEED + number, PER_RUN, calls, start_s, STEPS)
        run, struck = survive(inputs, f"many_{mode}_{number}", plan, *overrides)
        assert_the_same_run(run, reference)
        done, number = done + struck, number + 1
        (inputs / f"many_{mode}.kills").write_text("".join(f"{kill}\n" for kill in done))
    assert {kill.victim for kill in done} == set(VICTIMS)


@pytest.mark.kills
def test_a_run_killed_in_every_phase_of_a_save_gives_the_same_bits(inputs: Path) -> None:
    """The driver, at each request of one save to make something durable, visible or gone; the first save succeeds."""
    overrides = [*recipe(inputs, STEPS, "sync"), "run.keep_last=1"]
    reference, calls, _ = undisturbed(inputs, "phases", overrides)
    of_a_save = -(-calls // (STEPS // 2))
    plan = [Kill("driver", call=at) for at in (of_a_save + 1, *range(1, of_a_save + 1))]
    run, done = survive(inputs, "phases_killed", plan, *overrides)
    assert done == plan
    assert_the_same_run(run, reference)
