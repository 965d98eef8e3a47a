"""The real command on the real stack: Ray, megatron-core ranks, SGLang servers."""

import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from slime.observe.account import account, read
from tests.launch import Launched, finish, launch, make_inputs, start, wait_for_line

pytestmark = pytest.mark.e2e

TWO_RANKS = ("cluster.roles.actor.devices=2", "cluster.cpus_per_rank=0.5", "cluster.cpus_per_engine=0.5")
TWO_ENGINES = ("cluster.roles.rollout.devices=2", "rollout.engines=2")
STEPS = 12
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


def deterministic_recipe(inputs: Path) -> list[str]:
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl, samples: 2, temperature: 1}}}}"
    steps = f"run.steps={STEPS}", "run.eval_every=4", "run.save_every=4"
    return ["run.deterministic=true", "rollout.mode=one_step_off", "rollout.dump=true", *steps, evaluation, *TWO_RANKS]


@pytest.fixture(scope="module")
def deterministic(inputs: Path) -> Launched:
    """A run of two engines and two ranks, whose bits others must repeat."""
    run = launch(inputs, "deterministic", *deterministic_recipe(inputs), *TWO_ENGINES)
    assert_done(run)
    assert hf_bytes(run)
    return run


def assert_the_same_bits(run: Launched, other: Launched) -> None:
    assert hf_bytes(run) == hf_bytes(other)
    assert of_the_recipe(run) == of_the_recipe(other)


def test_two_engines_and_two_ranks_train_together(deterministic: Launched, inputs: Path):
    run, lines = deterministic, deterministic.metrics
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(line["mismatch/logprob_abs_diff"] < 1e-4 for line in lines[1:])
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert [line["staleness/max"] for line in lines[1:]] == [0] + [1] * (STEPS - 1)
    assert [k for k, line in enumerate(lines) if "eval/heldout/pass_at_k" in line] == [0, 4, 8, 12]
    assert lines[-1]["ledger/drawn"] == lines[-1]["ledger/trained"] == 4 * STEPS and lines[-1]["ledger/pending"] == 0
    assert lines[-1]["sync/version"] == STEPS
    assert (run.run_dir / "latest_checkpointed_iteration.txt").read_text() == f"{STEPS}\n"
    for name in ("config.yaml", "report.html", "trace.json.gz", "hf/model.safetensors", "hf/tokenizer.json", "logs/engine_1.log"):
        assert (run.run_dir / name).stat().st_size > 0, name
    before, after = load_file(inputs / "model" / "model.safetensors"), load_file(run.run_dir / "hf" / "model.safetensors")
    assert set(before) == set(after) and any(not np.array_equal(before[n], after[n]) for n in before)
    assert f"done: {STEPS} updates" in run.out and run.err == ""


def test_a_run_that_is_stopped_and_then_killed_gives_the_same_bits(deterministic: Launched, inputs: Path):
    """By the same command each time, and with one engine; beside it the command is refused, and after it there is nothing to do."""
    command = inputs, "disturbed", *deterministic_recipe(inputs)
    run_dir = inputs / "runs" / "disturbed"
    process, offspring = start(*command)
    wait_for_line(run_dir / ".lock", 0)
    beside = launch(*command)
    assert beside.code == 2 and "belongs to a run that is going on" in beside.err
    wait_for_line(run_dir / "metrics.jsonl", 2)
    process.send_signal(signal.SIGUSR1)
    stopped = finish(process, offspring, run_dir)
    assert stopped.code == 75, stopped.out + stopped.err
    assert offspring.left() == []
    process, offspring = start(*command)
    wait_for_line(run_dir / "metrics.jsonl", int((run_dir / "latest_checkpointed_iteration.txt").read_text()) + 3)
    process.kill()
    process.communicate()
    assert offspring.left(within_s=30.0) == []
    run = launch(*command)
    assert_done(run)
    assert_the_same_bits(run, deterministic)
    assert read(run.run_dir / "ledger.jsonl") == read(deterministic.run_dir / "ledger.jsonl")
    again = launch(*command)
    assert again.code == 4 and "has completed" in again.err


@pytest.mark.slow
@pytest.mark.parametrize("engines", [TWO_ENGINES, ()], ids=["two_engines", "one_engine"])
def test_another_run_of_the_recipe_gives_the_same_bits(deterministic: Launched, inputs: Path, engines: tuple[str, ...]):
    again = launch(inputs, f"again_{len(engines)}", *deterministic_recipe(inputs), *engines)
    assert_done(again)
    assert_the_same_bits(deterministic, again)


@pytest.mark.slow
def test_training_again_on_dumped_rollouts_gives_the_same_bits(deterministic: Launched, inputs: Path):
    overrides = "run.deterministic=true", f"run.steps={STEPS}", *TWO_RANKS
    replayed = launch(inputs, "replayed", *overrides, "run.only=train", f"run.replay={deterministic.run_dir}")
    assert_done(replayed)
    assert hf_bytes(replayed) == hf_bytes(deterministic)
    for line, first in zip(replayed.metrics[1:], deterministic.metrics[1:], strict=True):
        assert line["train/grad_norm"] == first["train/grad_norm"] and line["reward/mean"] == first["reward/mean"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one_step_off", "sync"])
def test_a_run_that_is_stopped_saves_and_the_same_command_goes_on(inputs: Path, mode: str):
    evaluation = f"data.eval={{heldout: {{path: {inputs}/eval.jsonl}}}}"
    overrides = f"rollout.mode={mode}", "run.eval_every=1", evaluation
    run_dir = inputs / "runs" / mode
    process, offspring = start(inputs, mode, *overrides, "run.steps=40")
    wait_for_line(run_dir / "metrics.jsonl", 3)
    process.send_signal(signal.SIGUSR1 if mode == "one_step_off" else signal.SIGTERM)
    first = finish(process, offspring, run_dir)
    assert first.code == 75, first.out + first.err
    assert offspring.left() == []
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    steps = saved + 2
    second = launch(inputs, mode, *overrides, f"run.steps={steps}")
    assert_done(second)
    assert [line["step"] for line in second.metrics] == list(range(steps + 1))
    assert all("eval/heldout/accuracy" in line for line in second.metrics)
    stale = 1 if mode == "one_step_off" else 0
    assert [line["staleness/max"] for line in second.metrics[1:]] == [0] + [stale] * (steps - 1)
    assert all(line["mismatch/logprob_abs_diff"] < 1e-4 for line in second.metrics[1:])
    assert account(read(run_dir / "ledger.jsonl")).trained == 4 * steps
    third = launch(inputs, mode, *overrides, f"run.steps={steps}")
    assert third.code == 4 and "has completed" in third.err


@pytest.mark.slow
def test_rollouts_alone_are_dumped_and_trained_on(inputs: Path):
    dumped = launch(inputs, "rollouts", "run.only=rollout", "rollout.dump=true")
    assert_done(dumped)
    assert not (dumped.run_dir / "hf").exists()
    replayed = launch(inputs, "replayed_alone", "run.only=train", f"run.replay={dumped.run_dir}")
    assert_done(replayed)
    assert replayed.metrics[1]["mismatch/logprob_abs_diff"] < 1e-4
    assert replayed.metrics[1]["reward/mean"] == dumped.metrics[1]["reward/mean"]


EXPERTS = ("trainer.expert_parallel=2", "trainer.max_tokens_per_rank=64", *TWO_RANKS)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Launched]:
    """A mixture of experts with latent attention, over two ranks."""
    inputs = make_inputs(tmp_path_factory.mktemp("experts"), "deepseek_v3")
    run = launch(inputs, "experts", "run.save_every=2", *EXPERTS)
    assert_done(run)
    return inputs, run


def test_experts_train_as_the_engine_routed_them(experts: tuple[Path, Launched]):
    inputs, run = experts
    for line in run.metrics[1:]:
        assert line["mismatch/logprob_abs_diff"] < 1e-5 and line["train/grad_norm"] > 0
        assert line["mismatch/experts_changed_frac"] == 0 and line["mismatch/logprob_abs_diff_without_replay"] < 1e-5  # fp32
    before, after = load_file(inputs / "model" / "model.safetensors"), load_file(run.run_dir / "hf" / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name for name in before if name not in changed} <= {name for name in before if "correction_bias" in name or ".experts." in name}


@pytest.mark.slow
def test_experts_go_on_with_their_layers_in_two_stages(experts: tuple[Path, Launched]):
    """The same run, in another layout; of other layouts: tests/trainer/test_shards.py."""
    inputs, _ = experts
    stages = launch(inputs, "experts", "run.save_every=2", "run.steps=3", "trainer.pipeline_parallel=2", *TWO_RANKS)
    assert_done(stages)
    assert [line["step"] for line in stages.metrics] == [0, 1, 2, 3]
    assert stages.metrics[3]["mismatch/logprob_abs_diff"] < 1e-5
