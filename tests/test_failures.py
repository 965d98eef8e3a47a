"""What the command says when something is wrong, and that it leaves no process behind."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import finish, launch, make_inputs, start, wait_for_line

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def broken_row(inputs: Path) -> str:
    (inputs / "broken.jsonl").write_text("{not json\n")
    return f"data.train=[{{path: {inputs}/broken.jsonl}}]"


def no_weights(inputs: Path) -> str:
    (inputs / "empty").mkdir()
    (inputs / "empty" / "config.json").write_text((inputs / "model" / "config.json").read_text())
    return f"model.path={inputs}/empty"


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("cluster.device=cuda", 3, "GPU"),
        (broken_row, 2, "line 1: not JSON"),
        (no_weights, 2, "safetensors"),
        pytest.param(
            "run.only=rollout rollout.dump=true rollout.engine_python=/bin/false",
            2,
            "rollout.engine_python=/bin/false: SGLang cannot be used there",
            marks=pytest.mark.slow,
        ),
        pytest.param("rollout.sglang.attention_backend=flashinfer", 1, "engine 0 ended with exit code", marks=pytest.mark.slow),
        pytest.param(
            "run.only=rollout rollout.dump=true reward.fn=tests.rewards_that_fail:always",
            5,
            "rewards failed (100%), above reward.max_error_frac=0.05",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no_gpu", "broken_data", "no_weights", "no_sglang", "engine_dies_at_start", "reward_raises"],
)
def test_a_failure_has_its_code_its_text_and_no_survivors(inputs: Path, override: str | Callable[[Path], str], code: int, says: str):
    overrides = override.split() if isinstance(override, str) else [override(inputs)]
    run = launch(inputs, "failing", *overrides, "run.resume=auto")
    assert run.code == code, run.out + run.err
    assert says in run.err
    assert run.offspring.left() == []


@pytest.mark.slow
def test_a_killed_engine_is_told_with_the_end_of_its_log_and_the_run_goes_on(inputs: Path):
    process, offspring = start(inputs, "engine_killed", "run.steps=30")
    wait_for_line(inputs / "runs" / "engine_killed" / "metrics.jsonl", 2)
    for pid, command in offspring.alive().items():
        if "sglang::scheduler" in command:
            os.kill(pid, signal.SIGKILL)
    run = finish(process, offspring, inputs / "runs" / "engine_killed")
    assert run.code == 0, run.out + run.err
    log = (run.run_dir / "logs" / "driver.log").read_text()
    assert "engine 0 is dead" in log and "engine 0 is healthy" in log and "restart 1 of" not in log
    assert run.metrics[-1]["step"] == 30 and run.metrics[-1]["ledger/drawn"] == 120
    assert offspring.left() == []
