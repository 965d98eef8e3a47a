"""The real command on the real stack: Ray, megatron-core ranks, SGLang servers."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.launch import Launched, finish, launch, make_inputs, start, wait_for_line

pytestmark = pytest.mark.e2e

TWO_RANKS = ("cluster.roles.actor.devices=2", "cluster.cpus_per_rank=0.5", "cluster.cpus_per_engine=0.5")
TWO_ENGINES = ("cluster.roles.rollout.devices=2", "rollout.engines=2")
NOT_OF_THE_RECIPE = ("time/", "sync/", "perf/", "engine/", "rollout/cpu")  # depend on the clock or on how many engines there are


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def assert_done(run: Launched) -> None:
    assert run.code == 0, run.out + run.err
    assert run.offspring.count > 5 and run.offspring.left() == []


def hf_bytes(run: Launched) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run.run_dir / "hf").glob("*.safetensors"))}


def of_the_recipe(run: Launched) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(NOT_OF_THE_RECIPE)} for line in run.metrics]


def test_two_engines_and_two_ranks_train_together(inputs: Path):
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl, samples: 2, temperature: 1}}}}"
    run = launch(inputs, "two", *TWO_RANKS, *TWO_ENGINES, "run.steps=3", "run.eval_every=2", "run.save_every=2", evaluation)
    assert_done(run)
    lines = run.metrics
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["mismatch/logprob_abs_diff"] < 1e-4 for line in lines[1:])
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert [k for k, line in enumerate(lines) if "eval/heldout/pass_at_k" in line] == [0, 2, 3]
    assert lines[-1]["ledger/drawn"] == lines[-1]["ledger/trained"] == 12 and lines[-1]["ledger/pending"] == 0
    assert lines[-1]["sync/version"] == 3
    assert (run.run_dir / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    for name in ("config.yaml", "report.html", "trace.json.gz", "hf/model.safetensors", "hf/tokenizer.json", "logs/engine_1.log"):
        assert (run.run_dir / name).stat().st_size > 0, name
    before, after = load_file(inputs / "model" / "model.safetensors"), load_file(run.run_dir / "hf" / "model.safetensors")
    assert set(before) == set(after) and any(not np.array_equal(before[n], after[n]) for n in before)
    assert "done: 3 updates" in run.out and run.err == ""


@pytest.fixture(scope="module")
def deterministic(inputs: Path) -> Launched:
    """A run whose bits others must repeat; its rollouts are dumped."""
    run = launch(inputs, "deterministic", "run.deterministic=true", "rollout.dump=true")
    assert_done(run)
    assert hf_bytes(run)
    return run


def assert_the_same_bits(run: Launched, other: Launched) -> None:
    assert_done(other)
    assert hf_bytes(run) == hf_bytes(other)
    assert of_the_recipe(run) == of_the_recipe(other)


def test_one_engine_and_two_give_the_same_bits(deterministic: Launched, inputs: Path):
    assert_the_same_bits(deterministic, launch(inputs, "two_engines", "run.deterministic=true", *TWO_ENGINES))


@pytest.mark.slow
def test_two_runs_of_a_recipe_give_the_same_bits(deterministic: Launched, inputs: Path):
    assert_the_same_bits(deterministic, launch(inputs, "again", "run.deterministic=true"))


def test_training_again_on_dumped_rollouts_gives_the_same_bits(deterministic: Launched, inputs: Path):
    replayed = launch(inputs, "replayed", "run.deterministic=true", "run.only=train", f"run.replay={deterministic.run_dir}")
    assert_done(replayed)
    assert hf_bytes(replayed) == hf_bytes(deterministic)
    for line, first in zip(replayed.metrics, deterministic.metrics, strict=True):
        assert {k: v for k, v in line.items() if k.startswith(("train/", "reward/"))}.items() <= first.items()


def test_a_run_that_is_stopped_saves_and_the_same_command_goes_on(inputs: Path):
    process, offspring = start(inputs, "stopped", "run.steps=40")
    run_dir = inputs / "runs" / "stopped"
    wait_for_line(run_dir / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    first = finish(process, offspring, run_dir)
    assert first.code == 75, first.out + first.err
    assert offspring.left() == []
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    second = launch(inputs, "stopped", f"run.steps={saved + 2}")
    assert_done(second)
    assert [line["step"] for line in second.metrics] == list(range(saved + 3))
    account = json.loads((run_dir / "ledger.json").read_text())
    assert account["ledger/drawn"] == account["ledger/trained"] == 4 * (saved + 2)
    third = launch(inputs, "stopped", f"run.steps={saved + 2}")
    assert third.code == 4 and "has completed" in third.err


@pytest.mark.slow
def test_rollouts_alone_are_dumped_and_trained_on(inputs: Path):
    dumped = launch(inputs, "rollouts", "run.only=rollout", "rollout.dump=true")
    assert_done(dumped)
    assert not (dumped.run_dir / "hf").exists()
    replayed = launch(inputs, "replayed", "run.only=train", f"run.replay={dumped.run_dir}")
    assert_done(replayed)
    assert replayed.metrics[1]["mismatch/logprob_abs_diff"] < 1e-4
    assert replayed.metrics[1]["reward/mean"] == dumped.metrics[1]["reward/mean"]


def test_one_step_off_trains_each_prompt_once(inputs: Path):
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl}}}}"
    run = launch(inputs, "overlap", "rollout.mode=one_step_off", "run.steps=3", "run.eval_every=1", evaluation)
    assert_done(run)
    assert all("eval/heldout/accuracy" in line for line in run.metrics)
    assert "mismatch/logprob_abs_diff" in run.metrics[1] and [line["staleness/max"] for line in run.metrics[1:]] == [0, 1, 1]
    assert run.metrics[-1]["ledger/trained"] == run.metrics[-1]["ledger/drawn"] == 12
