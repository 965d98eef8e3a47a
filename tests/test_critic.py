"""Whole runs of PPO: a critic beside the policy, on the actor's ranks or on its own, saved and resumed to the bit. That it learns
is shown by test_teachers.py, whose run has one too."""

from pathlib import Path

import pytest

from tests.launch import Launched, launch, make_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NOT_OF_THE_RECIPE = ("time/", "sync/", "perf/", "engine/", "rollout/cpu")
OWN = ("cluster.roles.critic.devices=1", "cluster.cpus_per_rank=0.5", "cluster.cpus_per_engine=0.5")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def ppo(inputs: Path, name: str, steps: int, *more: str) -> Launched:
    """One update of warm-up; two optimizer steps a batch."""
    recipe = ("algorithm.name=ppo", "algorithm.lam=0.95", "critic.lr=1e-2", "critic.warmup_steps=1", "trainer.updates_per_batch=2")
    run = launch(inputs, name, "run.deterministic=true", f"run.steps={steps}", "run.save_every=2", *recipe, *more)
    assert run.code == 0, run.out + run.err
    return run


def of_the_recipe(run: Launched) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(NOT_OF_THE_RECIPE)} for line in run.metrics]


def weights(run: Launched) -> bytes:
    return (run.run_dir / "hf" / "model.safetensors").read_bytes()


def critic_shards(run: Launched, step: int) -> bytes:
    return (run.run_dir / f"iter_{step:07d}" / "critic" / "__0_0.distcp").read_bytes()


@pytest.fixture(scope="module")
def straight(inputs: Path) -> Launched:
    return ppo(inputs, "straight", 4)


@pytest.mark.parametrize("own", [pytest.param((), id="shared"), pytest.param(OWN, id="own")])
def test_a_run_that_goes_on_gives_the_same_bits(inputs: Path, straight: Launched, own: tuple[str, ...]):
    """From a checkpoint in the middle, actor and critic both; a critic on ranks of its own is no other critic."""
    name = f"resumed{len(own)}"
    ppo(inputs, name, 2, *own)
    resumed = ppo(inputs, name, 4, *own)
    assert weights(resumed) == weights(straight)
    assert of_the_recipe(resumed) == of_the_recipe(straight)
    assert critic_shards(resumed, 4) == critic_shards(straight, 4)


def test_a_run_that_begins_from_one_without_a_critic_says_so(inputs: Path):
    begun = launch(inputs, "grpo")
    assert begun.code == 0, begun.out + begun.err
    run = ppo(inputs, "ppo_from_grpo", 4, f"run.resume={begun.run_dir}")
    assert "holds no critic: it begins anew" in run.out + run.err
    assert "train/loss" not in run.metrics[3] and run.metrics[4]["train/grad_norm"] > 0, "warm-up counts from there"
