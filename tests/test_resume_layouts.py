"""A run that goes on in another layout, or with another number of engines, has the losses of one that did not change."""

import shutil
from pathlib import Path

import pytest

from tests.launch import Launched, launch, make_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STEPS, SAVED = 6, 3
SMALL = ("cluster.cpus_per_rank=0.5", "cluster.cpus_per_engine=0.5")
TWO_RANKS = ("cluster.roles.actor.devices=2", *SMALL)
TWO_ENGINES = ("cluster.roles.rollout.devices=2", "rollout.engines=2", *SMALL)
COMPARED = ("train/loss", "train/pg_loss", "train/entropy", "train/grad_norm", "train/lr", "reward/mean", "offpolicy/kl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_for(inputs: Path, name: str, steps: int, *overrides: str) -> Launched:
    run = launch(inputs, name, "run.deterministic=true", f"run.steps={steps}", f"run.save_every={SAVED}", *overrides)
    assert run.code == 0, run.out + run.err
    return run


def go_on(inputs: Path, begun: Launched, name: str, *overrides: str) -> Launched:
    """The same run from its checkpoint, in a directory of its own."""
    shutil.copytree(begun.run_dir, inputs / "runs" / name)
    return run_for(inputs, name, STEPS, *overrides)


@pytest.fixture(scope="module")
def alone(inputs: Path) -> tuple[Launched, Launched]:
    """One rank and one engine: undisturbed, and up to the checkpoint."""
    return run_for(inputs, "alone", STEPS), run_for(inputs, "alone_begun", SAVED)


def assert_the_same_losses(run: Launched, reference: Launched) -> None:
    assert [line["step"] for line in run.metrics] == list(range(STEPS + 1))
    for ours, theirs in zip(run.metrics[SAVED + 1 :], reference.metrics[SAVED + 1 :], strict=True):
        for name in COMPARED:
            rounding = 1e-5 if ours["step"] == SAVED + 1 else 2e-4  # Adam makes more of it with every step
            assert ours[name] == pytest.approx(theirs[name], rel=rounding, abs=1e-6), (ours["step"], name)


def test_one_rank_becomes_two_of_tensor_parallel(inputs: Path, alone: tuple[Launched, Launched]) -> None:
    undisturbed, begun = alone
    run = go_on(inputs, begun, "to_tp2", "trainer.tensor_parallel=2", *TWO_RANKS)
    assert_the_same_losses(run, undisturbed)
    assert run.metrics[-1] != undisturbed.metrics[-1], "two ranks round elsewhere: they were there"


def test_two_data_parallel_ranks_become_one(inputs: Path) -> None:
    undisturbed, begun = run_for(inputs, "dp2", STEPS, *TWO_RANKS), run_for(inputs, "dp2_begun", SAVED, *TWO_RANKS)
    assert_the_same_losses(go_on(inputs, begun, "to_dp1"), undisturbed)


def test_one_engine_becomes_two(inputs: Path, alone: tuple[Launched, Launched]) -> None:
    undisturbed, begun = alone
    run = go_on(inputs, begun, "to_two_engines", *TWO_ENGINES)
    assert_the_same_losses(run, undisturbed)
    assert (run.run_dir / "logs" / "engine_1.log").exists()
    weights = [(folder.run_dir / "hf" / "model.safetensors").read_bytes() for folder in (run, undisturbed)]
    assert weights[0] == weights[1], "engines do not round"
