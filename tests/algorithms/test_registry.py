"""Every algorithm by its name: what it says of itself is so, and no knob is without effect where it is allowed."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from slime.algorithms.aggregation import token_weights
from slime.algorithms.base import Algorithm, LossInputs, Step
from slime.algorithms.registry import BUILDERS, build_algorithm
from slime.algorithms.sft import loss, targets
from slime.config import AlgorithmConfig
from slime.config.algorithm import TeacherConfig
from slime.config.algorithms import ALGORITHMS, REJECT_LEVELS
from slime.config.check_algorithm import check_algorithm
from slime.config.exits import ConfigError
from slime.config.roles import uses_reference
from tests.algorithms.local import LocalSequences
from tests.algorithms.test_terms import make_batch, make_step

HERE = __name__
KNOBS = {field.name: field for field in fields(AlgorithmConfig)}

KL = {"kl_loss_coef": 0.3}
KL_REWARD = {"kl_reward_coef": 0.3}
WEIGHED = {"importance": "token"}
REJECTING = {"importance_reject": {"lowest": [0.7, 1.5]}}
SAMPLED, TOPK, JSD = {"distill": "sampled"}, {"distill": "topk"}, {"distill": "full", "distill_beta": 0.5}

# knob -> (what else a recipe says, another value than it has there), all of which act where an algorithm reads them
CHANGES = {
    "name": [({}, "rloo"), ({}, "gspo")],
    "aggregation": [({}, "sequence"), ({}, "constant")],
    "normalize": [({}, False)],
    "gamma": [({}, 0.9)],
    "lam": [({}, 0.5)],
    "clip_low": [({"clip_high": 0.3}, 0.05)],
    "clip_high": [({}, 0.9)],
    "clip_dual": [({}, 1.5)],
    "entropy_coef": [({}, 0.1)],
    "kl_loss_coef": [({}, 0.3)],
    "reference_every": [(KL, 5), (KL_REWARD, 5)],
    "kl_reward_coef": [({}, 0.3)],
    "kl_estimator": [
        *((KL, "k3"), (KL, "unbiased"), (KL | {"kl_estimator": "k3"}, "k2")),
        *((KL_REWARD, "k2"), (KL_REWARD, "k3"), (KL_REWARD | {"kl_estimator": "k2"}, "k1")),
    ],
    "importance": [({}, "token"), ({}, "sequence"), ({}, "geometric")],
    "importance_low": [(WEIGHED, 0.9)],
    "importance_high": [(WEIGHED, 1.2)],
    "importance_reject": [(given, {level: [0.7, 1.5]}) for given in ({}, WEIGHED) for level in REJECT_LEVELS],
    "importance_normalize": [(WEIGHED, True), (REJECTING, True)],
    "opsm_delta": [({}, 0.1), (WEIGHED, 0.1)],
    "teachers": [(SAMPLED, {"a": TeacherConfig("a")})],
    "distill": [({}, "sampled"), ({}, "topk"), ({}, "full")],
    "distill_coef": [(SAMPLED, 0.5), (TOPK, 0.5), (JSD, 0.5)],
    "distill_beta": [(TOPK, 0.0), (JSD, 0.2)],
    "distill_top_k": [(TOPK, 4)],
}
# What the trainer does with them: tests/trainer/test_teaching.py, test_reference.py
OUTSIDE = {"teachers", "reference_every", "distill_beta", "distill_top_k"}

# The least that an algorithm must be told
LEAST = {name: SAMPLED if name == "opd" else {} for name in ALGORITHMS}


def recipe(name: str, *given: dict) -> AlgorithmConfig:
    knobs = {"name": name, **LEAST[name]}
    for more in given:
        knobs |= more
    return AlgorithmConfig(**knobs)


def accepted(*recipes: AlgorithmConfig) -> bool:
    try:
        for cfg in recipes:
            check_algorithm(cfg)
    except ConfigError:
        return False
    return True


def step_for(algorithm: Algorithm, cfg: AlgorithmConfig) -> Step:
    """Twelve answers to four prompts, and no more of them than the algorithm asks for."""
    rng = np.random.default_rng(3)
    masks = [[0, *(rng.random(int(n)) < 0.8), 1] for n in rng.integers(1, 6, 12)]
    step = make_step(make_batch(masks, rng.normal(size=12), np.arange(12) % 4))
    drawn = step.old_logprobs + np.where(step.batch.loss_mask, rng.normal(0, 0.5, len(step.batch.tokens)), 0)  # the engine's, nearly
    step.batch.rollout_logprobs[:] = drawn
    asked = {
        "old_logprobs": algorithm.needs_old_logprobs,
        "ref_logprobs": algorithm.uses_reference,
        "teacher_logprobs": cfg.distill == "sampled",
        "values": algorithm.uses_critic,
    }
    return replace(step, **{name: None for name, wanted in asked.items() if not wanted})


def inputs_for(algorithm: Algorithm, cfg: AlgorithmConfig, step: Step, advantages) -> LossInputs:
    """Tokens that the policy has moved far from, and that the engine saw otherwise than the trainer."""
    batch = step.batch
    mask = batch.loss_mask
    generator = torch.Generator().manual_seed(4)
    start, update, engine, entropy, reference, divergence = torch.randn(6, int(mask.sum()), generator=generator, dtype=torch.float64)
    old = -1 - start.abs()
    return LossInputs(
        logprobs=(old + update).requires_grad_(),
        old_logprobs=old if algorithm.uses_old_logprobs else torch.full_like(old, torch.nan),
        entropy=entropy.abs().requires_grad_(),
        advantages=torch.from_numpy(advantages[mask]),
        rollout_logprobs=old + 0.5 * engine,
        sequences=LocalSequences(torch.from_numpy(batch.sample_of_token[mask])),
        ref_logprobs=old + reference if algorithm.uses_reference else None,
        distillation=divergence.abs().requires_grad_() if cfg.distill in ("topk", "full") else None,
        importance_scale=1.0 if algorithm.importance_scale is None else algorithm.importance_scale(step),
    )


def results(cfg: AlgorithmConfig) -> dict[str, np.ndarray]:
    """What comes of a recipe: targets, the loss of every trainable token, and the weights with which it counts."""
    algorithm = build_algorithm(cfg)
    step = step_for(algorithm, cfg)
    batch, aims = step.batch, algorithm.targets(step)
    out = algorithm.loss(inputs_for(algorithm, cfg, step, aims.advantages)).loss.detach().numpy()
    returns = np.zeros(len(batch.tokens)) if aims.returns is None else aims.returns
    weights = token_weights(batch, cfg.aggregation, 8)
    found = {"advantages": aims.advantages, "returns": returns, "loss": out, "weights": weights}
    assert all(np.isfinite(values).all() for values in found.values())
    return found


def differ(one: AlgorithmConfig, other: AlgorithmConfig) -> bool:
    first, second = results(one), results(other)
    return any(np.abs(first[name] - second[name]).max() > 1e-9 for name in first)


def pairs(name: str, knob: str) -> list[tuple[AlgorithmConfig, AlgorithmConfig]]:
    """Recipes that differ in one knob."""
    made = [(recipe(name, given), recipe(name, given, {knob: value})) for given, value in CHANGES[knob]]
    return [(one, other) for one, other in made if one != other]


# Knobs


@pytest.mark.thorough
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_knob_changes_a_result_or_is_refused_by_name(name):
    for knob in KNOBS:
        allowed = [pair for pair in pairs(name, knob) if accepted(*pair)]
        if not allowed:
            for _, value in CHANGES[knob]:
                with pytest.raises(ConfigError, match=rf"^algorithm\.{knob}=\S+ has no effect with algorithm\.name={name}: "):
                    check_algorithm(recipe(name, {knob: value}))
        elif knob not in OUTSIDE:
            for one, other in allowed:
                assert differ(one, other), other


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_reads_what_it_says_and_nothing_else(name):
    for knob in KNOBS:
        allowed = [pair for pair in pairs(name, knob) if accepted(*pair)]
        assert bool(allowed) == (knob in ALGORITHMS[name].reads), knob
        if not allowed:
            assert not any(differ(one, other) for one, other in pairs(name, knob)), knob


@pytest.mark.thorough
@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_that_an_algorithm_is_given_is_changed(name):
    recipes = {str(other): other for knob in KNOBS for _, other in pairs(name, knob) if accepted(other)}
    assert recipes
    for cfg in recipes.values():
        algorithm = build_algorithm(cfg)
        step = step_for(algorithm, cfg)
        before = copies(step)
        advantages = algorithm.targets(step).advantages
        inputs = inputs_for(algorithm, cfg, step, advantages)
        given = copies(inputs)
        algorithm.loss(inputs).loss.sum().backward()
        for then, now in ((before, copies(step)), (given, copies(inputs))):
            assert then.keys() == now.keys() and len(then) >= 5
            for field in then:
                np.testing.assert_array_equal(then[field], now[field], err_msg=f"{field} of {cfg}")


def copies(given: Step | LossInputs) -> dict[str, np.ndarray]:
    """Every number in a record, as it is now."""
    parts = {field.name: getattr(given, field.name) for field in fields(given)}
    parts |= parts["batch"].columns() if "batch" in parts else {}
    tensors = {name: part.detach().numpy() for name, part in parts.items() if isinstance(part, torch.Tensor)}
    arrays = {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}
    return {name: part.copy() for name, part in (tensors | arrays).items()}


def test_every_knob_and_each_of_its_choices_is_tried():
    assert CHANGES.keys() == KNOBS.keys()
    for knob, field in KNOBS.items():
        if knob in ("teachers", "importance_reject"):
            continue
        tried = {value for _, value in CHANGES[knob]} | {field.default}
        assert tried >= set(field.metadata.get("choices", ())) and len(tried) > 1, knob


def test_what_an_algorithm_reads_are_knobs():
    for name, traits in ALGORITHMS.items():
        assert traits.reads <= KNOBS.keys(), name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_two_algorithms_are_the_same(name):
    assert all(differ(recipe(name), recipe(other)) for other in ALGORITHMS if other != name)


@pytest.mark.parametrize("distill", ["topk", "full"])
@pytest.mark.parametrize("knob", ["clip_low", "clip_high", "clip_dual", "importance", "importance_reject", "opsm_delta"])
def test_without_a_policy_loss_its_knobs_act_or_are_refused(knob, distill):
    for given, value in CHANGES[knob]:
        one, other = (recipe("opd", given, {"distill": distill}, more) for more in ({}, {knob: value}))
        assert not accepted(other) or differ(one, other)


# Traits


@pytest.mark.parametrize("name", BUILDERS)
def test_every_name_builds_what_its_traits_say(name):
    algorithm, traits = build_algorithm(recipe(name)), ALGORITHMS[name]
    assert (algorithm.needs_rollouts, algorithm.uses_critic) == (traits.needs_rollouts, traits.critic)


@pytest.mark.parametrize("coef", [{}, KL, KL_REWARD], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_plan_knows_who_has_a_reference(name, coef):
    cfg = recipe(name, coef)
    if accepted(cfg):
        assert uses_reference(cfg) == build_algorithm(cfg).uses_reference == bool(coef)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_without_rewards_does_not_feel_them(name):
    algorithm, cfg = build_algorithm(recipe(name)), recipe(name)
    step = step_for(algorithm, cfg)
    other = replace(step, batch=replace(step.batch, rewards=step.batch.rewards[::-1].copy()))
    first, second = (algorithm.targets(known).advantages for known in (step, other))
    assert ALGORITHMS[name].rewarded == (np.abs(first - second).max() > 1e-9)


def test_traits_and_builders_have_the_same_names():
    assert ALGORITHMS.keys() == BUILDERS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_single_answer_teaches_nothing_where_answers_are_compared(name):
    """Of sft, whose advantages are 0 always, and of opd, which looks at no reward, this says nothing."""
    step = make_step(make_batch([[0, 1, 1]] * 3, [1.0, 0.0, 5.0], [0, 1, 2]))
    if name not in ("sft", "opd"):
        assert ALGORITHMS[name].compares == (not build_algorithm(recipe(name)).targets(step).advantages.any())
    else:
        assert not ALGORITHMS[name].compares


# Names


def mine(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(targets=targets, loss=loss, uses_old_logprobs=cfg.entropy_coef > 0)


def not_an_algorithm(cfg: AlgorithmConfig) -> str:
    return "grpo"


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_an_import_path_builds_from_the_recipe(coef):
    built = build_algorithm(AlgorithmConfig(f"{HERE}:mine", entropy_coef=coef))
    assert built.uses_old_logprobs == (coef > 0) and built.needs_rollouts and built.loss is loss


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", r"^algorithm\.name=grop: no such algorithm; did you mean grpo\?$"),
        ("reinforce", r"^algorithm\.name=reinforce: no such algorithm; did you mean reinforce_pp\?$"),
        (
            "zebra",
            r"^algorithm\.name=zebra: no such algorithm; "
            r"choose grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd, sft or pkg\.mod:fn$",
        ),
        ("no_such_package.mod:fn", r"^algorithm\.name=no_such_package\.mod:fn: no module no_such_package"),
        (f"{HERE}:mime", r"^algorithm\.name=.*:mime: .*did you mean mine\?$"),
        (f"{HERE}:not_an_algorithm", r"^algorithm\.name=.* returned str; it must return slime\.algorithms\.base\.Algorithm$"),
    ],
)
def test_a_wrong_name_says_what_to_change(name, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(AlgorithmConfig(name))
