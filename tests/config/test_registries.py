"""Names that config/ repeats, since it may not import the rooms that own them, are theirs."""

import json

import pytest

from slime.algorithms.registry import BUILDERS, build_algorithm
from slime.config import AlgorithmConfig, RewardConfig
from slime.config.check_functions import REWARDS
from slime.config.check_serving import FROM_KNOBS
from slime.config.roles import ALGORITHMS, generates, needed_roles, needs_rollouts, uses_critic
from slime.cpu import serving
from slime.engine.settings import server_arguments
from slime.rollout.rewards.builtin import builtin
from tests.config.composing import composed
from tests.config.conftest import MODEL


def test_algorithms() -> None:
    assert ALGORITHMS.keys() == BUILDERS.keys()
    for name, traits in ALGORITHMS.items():
        built = build_algorithm(AlgorithmConfig(name))
        assert built.needs_rollouts == traits.needs_rollouts == needs_rollouts(AlgorithmConfig(name))
        assert built.uses_critic == traits.critic == uses_critic(AlgorithmConfig(name))


def test_rewards() -> None:
    for name in REWARDS:
        assert builtin(RewardConfig(fn=name, pattern="x"), "reward.fn") is not None
    assert builtin(RewardConfig(fn="no such reward"), "reward.fn") is None


def test_server_arguments_that_come_from_knobs(workdir) -> None:
    """For a mixture of experts, whose engine has one argument more, on a CPU and on a GPU that is the trainer's too."""
    (workdir / "model" / "config.json").write_text(json.dumps({**MODEL, "model_type": "qwen3_moe"}))
    arguments = server_arguments(composed("model.path=model"), "cpu")
    assert arguments.keys() - serving.arguments(False).keys() - FROM_KNOBS.keys() == {
        "custom_weight_loader",
        "log_level_http",
        "max_running_requests",
        "max_total_tokens",
    }
    shared = server_arguments(composed("model.path=model", "cluster.share=swap"), "cuda")
    assert arguments.keys() | shared.keys() >= FROM_KNOBS.keys() > arguments.keys() & FROM_KNOBS.keys()


@pytest.mark.parametrize(
    ("overrides", "roles", "answers"),
    [
        ([], ("actor", "rollout"), True),
        (["algorithm.name=functions:explore"], ("actor", "rollout"), True),
        (["algorithm.name=functions:imitate"], ("actor",), False),
        (["algorithm.name=sft"], ("actor",), False),
        (["run.only=train"], ("actor",), False),
        (["algorithm.name=ppo"], ("actor", "rollout"), True),
        (["algorithm.name=ppo", "cluster.roles.critic.devices=2"], ("actor", "critic", "rollout"), True),
        (["algorithm.name=functions:judged", "cluster.roles.critic.devices=2"], ("actor", "critic", "rollout"), True),
        (["algorithm.name=ppo", "cluster.roles.critic.devices=2", "run.only=rollout"], ("rollout",), True),
        (["algorithm.name=ppo", "cluster.roles.critic.devices=2", "run.only=train"], ("actor", "critic"), False),
        (["run.only=rollout"], ("rollout",), True),
        (["rollout.external_urls=['http://h:1']"], ("actor",), True),
    ],
)
def test_roles_of_a_recipe(overrides: list[str], roles: tuple[str, ...], answers: bool, workdir) -> None:
    cfg = composed("model.path=model", *overrides)
    assert (needed_roles(cfg), generates(cfg)) == (roles, answers)
