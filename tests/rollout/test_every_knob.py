"""Every knob of rollout and reward: a change of it shows in what engines are asked and what is trained on, or in the test that is named. A
new knob has to be put into one of the tables. What is refused because it would do nothing: tests/config/test_bad_recipes.py."""

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from slime.config import RewardConfig, RolloutConfig, SlimeConfig
from tests.rollout.test_manager import _no_ray, cfg, prompt_of, rollout  # noqa: F401 - fixtures

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).parents[1]
FUNCTIONS = "tests.rollout.generate_functions:"
FORMAT, SHORT = {"reward.fn": "format", "reward.pattern": "^yes$"}, {"rollout.max_response_tokens": 4, "reward.overlong_buffer": 2}

# knob -> (what else the recipe says, another value than it has there)
SHOWN: dict[str, tuple[dict[str, Any], Any]] = {
    "rollout.prompts_per_step": ({}, 3),
    "rollout.samples_per_prompt": ({}, 3),
    "rollout.max_response_tokens": ({}, 7),
    "rollout.temperature": ({}, 0.7),
    "rollout.top_p": ({}, 0.9),
    "rollout.stop": ({}, ["a"]),
    "rollout.generate": ({}, FUNCTIONS + "twice"),
    "rollout.filter": ({}, FUNCTIONS + "odd_ordinals_go"),
    "rollout.select": ({}, "arrival"),
    "rollout.oversample": ({"rollout.select": "arrival"}, 0.75),
    "rollout.mask_truncated": ({}, True),
    "reward.fn": ({}, "builtins:bool"),
    "reward.pattern": (FORMAT, "^no$"),
    "reward.overlong_buffer": (SHORT, 3),
    "reward.overlong_penalty": (SHORT, 0.5),
}
# knob -> the test that shows it, where engines, processes, files or time are needed
ELSEWHERE = {
    "rollout.mode": "test_loop.py::test_one_step_off_generates_beside_the_update_and_evaluates_with_nothing_in_flight",
    "rollout.engines": "engine/test_settings.py::test_the_pool_holds_every_running_request_at_its_longest",
    "rollout.max_in_flight": "engine/test_settings.py::test_the_pool_holds_every_running_request_at_its_longest",
    "rollout.tensor_parallel": "engine/test_settings.py::test_environment_of_a_cpu_server",
    "rollout.dump": "test_train.py::test_rollouts_alone_are_dumped_and_trained_on",
    "rollout.external_urls": "engine/test_fleet.py::test_servers_of_the_user_are_used_and_left_alone",
    "rollout.external_key_env": "engine/test_fleet.py::test_servers_of_the_user_are_used_and_left_alone",
    "rollout.join": "engine/test_fleet.py::test_a_server_that_comes_late_is_caught_up_proven_and_then_used",
    "rollout.engine_python": "engine/test_arguments.py::test_an_interpreter_that_cannot_serve",
    "rollout.quantization": "engine/test_fp8.py::test_codes_and_scales_after_many_deltas_are_those_of_the_quantised_export",
    "rollout.replay_experts": "engine/test_settings.py::test_engines_of_a_mixture_of_experts_say_which_they_chose",
    "rollout.start_timeout_s": "rollout/test_manager.py::test_requests_wait_for_an_engine_only_so_long",
    "rollout.request_timeout_s": "rollout/test_manager.py::test_an_engine_that_fails",
    "rollout.health_timeout_s": "engine/test_recovery.py::test_an_engine_whose_scheduler_hangs_is_replaced",
    "rollout.max_restarts": "engine/test_health.py::test_the_number_of_restarts_counts_between_two_versions",
    "rollout.sglang": "engine/test_settings.py::test_what_the_user_says_comes_last",
    "reward.signature": "rollout/test_rewards.py::test_verl_s_signature",
    "reward.url": "rollout/test_rewards.py::test_a_url_judges",
    "reward.timeout_s": "rollout/test_rewards.py::test_a_bad_answer_costs_itself_and_no_other",
    "reward.workers": "rollout/test_rewards.py::test_as_many_processes_judge_as_the_recipe_says",
    "reward.max_error_frac": "rollout/test_manager.py::test_a_group_whose_reward_failed_is_replaced",
}


def said(recipe: SlimeConfig, knobs: dict[str, Any]) -> SlimeConfig:
    """The recipe with these knobs, as its fixture made it otherwise."""
    for knob, value in knobs.items():
        group, _, name = knob.partition(".")
        assert getattr(getattr(recipe, group), name) != value, f"{knob} is {value} already"
        setattr(getattr(recipe, group), name, value)
    return recipe


def seen(recipe: SlimeConfig) -> tuple:
    """What engines are asked for, and what comes of the answers: to every third prompt they are cut off, and wrong."""
    batch, summary, double = rollout(recipe, lambda body: "long" if prompt_of(body) % 3 == 1 else "yes")
    asked = sorted(f"{prompt_of(body)} {json.dumps(body['sampling_params'], sort_keys=True)}" for body in double.asked)
    of_batch = (batch.group.tolist(), batch.rewards.tolist(), batch.trained_lengths.tolist())
    return asked, of_batch, summary.drawn


@pytest.mark.parametrize("knob", SHOWN)
def test_a_change_shows(cfg: SlimeConfig, knob: str) -> None:  # noqa: F811 - a fixture
    given, value = SHOWN[knob]
    before = seen(said(cfg, given))
    assert seen(said(cfg, {knob: value})) != before


def test_without_a_change_nothing_shows(cfg: SlimeConfig) -> None:  # noqa: F811 - a fixture
    assert seen(cfg) == seen(cfg)


def test_every_knob_is_changed_or_shown_elsewhere() -> None:
    groups = {"rollout": RolloutConfig, "reward": RewardConfig}
    assert sorted([*SHOWN, *ELSEWHERE]) == sorted(f"{group}.{field.name}" for group, of in groups.items() for field in fields(of))


@pytest.mark.parametrize("knob", ELSEWHERE)
def test_the_named_test_is_there_and_its_file_knows_the_knob(knob: str) -> None:
    file, _, name = ELSEWHERE[knob].partition("::")
    text = (TESTS / file).read_text()
    assert name in {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert knob.partition(".")[2] in text
