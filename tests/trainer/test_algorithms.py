"""Every algorithm: an update's gradient does not depend on how it is cut into micro-batches, packed, ordered and laid out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.config.algorithm import AlgorithmConfig, TeacherConfig
from slime.config.algorithms import ALGORITHMS
from tests.trainer.gradients import assert_same, gradient, gradients_by_recipe, log_probs, noisy_old
from tests.trainer.ranks import make_batch, make_cfg

pytestmark = pytest.mark.e2e
TAUGHT = {"name": "opd", "distill_coef": 0.5}
# name -> knobs of `algorithm`: each algorithm with terms that look beyond a token
CASES = {
    "grpo": {"name": "grpo", "importance": "geometric", "kl_loss_coef": 0.1, "aggregation": "sequence", "entropy_coef": 0.1}
    | {"importance_reject": {"lowest": [0.7, math.inf]}, "importance_normalize": True},
    "rloo": {"name": "rloo", "importance": "sequence", "importance_high": 1e3, "kl_loss_coef": 0.1, "kl_estimator": "k3"}
    | {"importance_reject": {"geometric": [0.9, 1.2], "token": [0.5, 1.6]}},
    "reinforce_pp": {"name": "reinforce_pp", "kl_reward_coef": 0.1, "gamma": 0.9, "opsm_delta": 0.01},
    "reinforce_pp_baseline": {"name": "reinforce_pp_baseline", "kl_reward_coef": 0.1, "aggregation": "constant"},
    "gspo": {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05},
    "cispo": {"name": "cispo", "clip_high": 0.5, "kl_loss_coef": 0.1, "kl_estimator": "unbiased"},
    "ppo": {"name": "ppo", "kl_reward_coef": 0.1, "kl_estimator": "k3", "lam": 0.8, "clip_dual": 1.1},
    "sft": {"name": "sft", "aggregation": "sequence"},
    "opd": {**TAUGHT, "distill": "sampled"},
    "opd_topk": {**TAUGHT, "distill": "topk", "distill_beta": 0.5, "distill_top_k": 5},
    "opd_full": {**TAUGHT, "distill": "full"},
    "grpo_full": {"name": "grpo", "distill": "full", "distill_beta": 0.0, "distill_coef": 0.3},
}
LAYOUTS = {
    "DP2 x PP2": (4, {"pipeline_parallel": 2}),
    "TP2 x CP2": (4, {"tensor_parallel": 2, "context_parallel": 2}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor_parallel": 2}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "CP2": (2, {"context_parallel": 2}),
}


def recipe(models, case: str, **trainer):
    cfg = make_cfg(models["qwen3"], **trainer)
    cfg.rollout.temperature = 0.8
    for knob, value in CASES[case].items():
        setattr(cfg.algorithm, knob, value)
    if cfg.algorithm.distill != "none":
        cfg.algorithm.teachers = {"a": TeacherConfig(str(models["qwen3_tied"])), "b": TeacherConfig(str(models["llama"]))}
    return cfg


def update(ranks, models, case: str, batch, old, world: int = 1, reorder: int | None = None, **trainer):
    """See `gradient`."""
    return ranks.run(gradient, world, recipe(models, case, **trainer), batch, old, reorder, models["qwen3_tied"])[0]


@pytest.fixture(scope="module")
def batch(ranks, models):
    found = make_batch(samples=12, vocab=77)
    found = replace(found, teacher=np.arange(12) % 2)
    drawn = ranks.run(log_probs, 1, recipe(models, "sft"), found)[0]  # engines drew it, nearly
    noise = np.random.default_rng(3).normal(0, 0.2, len(drawn))
    return replace(found, rollout_logprobs=((drawn + noise) * found.loss_mask).astype(np.float32))


@pytest.fixture(scope="module")
def old(ranks, models, batch):
    return noisy_old(batch, ranks.run(log_probs, 1, recipe(models, "sft"), batch)[0])


@pytest.fixture(scope="module")
def alone(ranks, models, batch, old):
    """The update of one process in one micro-batch, by case."""
    return ranks.run(gradients_by_recipe, 1, {case: recipe(models, case) for case in CASES}, batch, old, models["qwen3_tied"])[0]


@pytest.fixture(scope="module")
def laid_out(ranks, models, batch, old):
    """The update by case in a layout, all of them in the same groups: their meeting takes longer than an update."""
    found = {}

    def of(layout):
        if layout not in found:
            world, knobs = LAYOUTS[layout]
            recipes = {case: recipe(models, case, max_tokens_per_rank=60, **knobs) for case in CASES if applies(case, layout)}
            found[layout] = ranks.run(gradients_by_recipe, world, recipes, batch, old, models["qwen3_tied"])[0]
        return found[layout]

    return of


def applies(case, layout):
    """The whole distribution in pipeline stages is refused: tests/config/test_check_teachers.py."""
    return not (CASES[case].get("distill") == "full" and "PP" in layout)


def test_every_algorithm_has_a_case() -> None:
    """Of ppo the policy; the critic's own gradient is test_critic.py's."""
    assert {case["name"] for case in CASES.values()} == ALGORITHMS.keys()


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_packing_and_order_do_not_matter(ranks, models, batch, old, alone, case) -> None:
    expected = alone[case]
    assert max(float(grad.abs().max()) for grad in expected[1].values()) > 1e-4, "there is a gradient"
    assert_same(update(ranks, models, case, batch, old, max_tokens_per_rank=1), expected)
    assert_same(update(ranks, models, case, batch, old, reorder=5), expected)
    order = np.random.default_rng(2).permutation(len(batch))  # which interleaves groups
    spans = np.concatenate([np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in order])
    assert_same(update(ranks, models, case, batch.select(order), old[spans]), expected)


LOOKED_FOR = ("kl_loss_coef", "kl_reward_coef", "importance", "importance_reject", "importance_normalize", "opsm_delta")


@pytest.mark.parametrize(("case", "knob"), [(case, knob) for case, knobs in CASES.items() for knob in LOOKED_FOR if knob in knobs])
def test_terms_are_felt(ranks, models, batch, old, alone, case, knob) -> None:
    """Of bounds that all tokens keep, or of a reference that is the policy itself, nothing would be seen here, whatever the layout made of
    it."""
    _, expected, _ = alone[case]
    cfg = recipe(models, case)
    setattr(cfg.algorithm, knob, getattr(AlgorithmConfig(), knob))
    _, without, _ = ranks.run(gradient, 1, cfg, batch, old)[0]
    apart = sum(float((without[name] - grad).square().sum()) for name, grad in expected.items()) ** 0.5
    assert apart > 1e-3 * sum(float(grad.square().sum()) for grad in expected.values()) ** 0.5


@pytest.mark.parametrize("case", ["grpo", "gspo", "ppo", "opd"])
def test_tokens_outside_the_mask_have_no_say(ranks, models, batch, old, alone, case) -> None:
    """Prompts and the answers of tools: nonsense in every column there, and the gradient is the same to the bit."""
    expected = alone[case]
    nonsense = np.where(batch.loss_mask, 0.0, 7.0).astype(np.float32)
    spoilt = replace(batch, rollout_logprobs=batch.rollout_logprobs + nonsense)
    found = update(ranks, models, case, spoilt, old + nonsense)
    assert found[0] == expected[0] and all(torch.equal(grad, expected[1][name]) for name, grad in found[1].items())


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if world == 4 else pytest.mark.slow)
        for layout, (world, _) in LAYOUTS.items()
        for case in CASES
        if applies(case, layout)
    ],
)
def test_layouts_do_not_matter(alone, laid_out, case, layout, record_property) -> None:
    record_property("worst gradient", assert_same(laid_out(layout)[case], alone[case]))
