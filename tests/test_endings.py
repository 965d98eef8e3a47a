"""How a whole run ends by itself and goes on: a limit in hours, a batch that is not finite, a changed recipe."""

import json
import shlex
from pathlib import Path

import pytest

from slime.observe.account import account, read
from slime.rollout.dump import read_batch
from tests.launch import finish, launch, make_inputs, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
GRACE_S = 20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_limit_in_hours_saves_and_the_same_command_goes_on(inputs: Path) -> None:
    limited = ("run.steps=100000", f"run.grace_s={GRACE_S}", f"run.max_hours={(120 + GRACE_S) / 3600}")
    first = finish(*start(inputs, "limited", *limited), inputs / "runs" / "limited")
    assert first.code == 75 and "stopped by run.max_hours=" in first.err, first.out[-3000:] + first.err
    saved = int((first.run_dir / "latest_checkpointed_iteration.txt").read_text())
    assert saved == first.metrics[-1]["step"] and first.summary["status"] == "saved"
    second = launch(inputs, "limited", f"run.steps={saved + 2}")
    assert second.code == 0, second.out + second.err
    assert account(read(second.run_dir / "ledger.jsonl")).trained == 4 * (saved + 2)
    assert second.offspring.left() == []


def test_a_batch_that_is_not_finite_stops_the_run_and_is_replayed_alone(inputs: Path) -> None:
    own = ("run.steps=6", "run.save_every=1", "reward.fn=tests.rollout.reward_functions:overflows_later")
    run = launch(inputs, "overflow", *own)
    assert run.code == 5 and "update 3: the loss is" in run.err and "the step was not taken" in run.err, run.out + run.err
    assert [line["step"] for line in run.metrics] == [0, 1, 2] and run.summary["status"] == "stopped"
    assert (run.run_dir / "latest_checkpointed_iteration.txt").read_text() == "2\n", "the save of step 2 was in flight"
    kept, summary = read_batch(run.run_dir / "stopped" / "step_0000002.npz", "")
    assert summary.trained == [8, 9, 10, 11] and kept.rewards.max() > 1e300
    command = shlex.split(run.err.partition("of this run> ")[2].splitlines()[0])
    again = launch(inputs, "overflow-replay", *own, *command)
    assert again.code == 5 and "update 3: the loss is" in again.err, again.out + again.err
    assert json.loads((again.run_dir / "summary.json").read_text())["steps"] == 2


def test_another_course_is_refused_by_name_and_can_be_accepted(inputs: Path) -> None:
    assert launch(inputs, "course", "run.save_every=2").code == 0
    refused = launch(inputs, "course", "run.steps=3", "trainer.lr=1e-4", "rollout.temperature=0.9")
    assert refused.code == 2 and "trainer.lr" in refused.err and "rollout.temperature" in refused.err
    accepted = ("run.steps=3", "trainer.lr=1e-4", "run.accept_changes=[trainer.lr]")
    run = launch(inputs, "course", *accepted)
    assert run.code == 0 and run.metrics[3]["train/lr"] == 1e-4, run.out + run.err


def test_a_rollout_that_does_not_end_says_what_it_waits_for(inputs: Path) -> None:
    stuck = ("rollout.generate=tests.rollout.generate_functions:never_ends", "cluster.step_timeout_s=20", "run.max_restarts=1")
    run = launch(inputs, "stuck", *stuck)
    assert run.code == 1 and run.offspring.left() == [], run.out + run.err
    assert "rollout 1: 0 of 4 prompts finished after 20 s (cluster.step_timeout_s): 16 tasks in rollout/groups.py" in run.err.replace(
        "\n", " "
    )
    assert "engine 0 is ready" in run.err and "restart 1 of 1" in (run.run_dir / "logs" / "driver.log").read_text()
