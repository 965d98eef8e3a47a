"""REINFORCE++ with and without a baseline: returns of tokens of a worked example, whitened or not."""

import numpy as np
import pytest
import torch

from slime.algorithms import reinforce_pp
from slime.config import AlgorithmConfig
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import (
    after_updates,
    gradients_agree_with_finite_differences,
    make_batch,
    make_step,
    others,
    ppo_loss,
    ratios,
    slope,
    spoilt,
    teaching,
    token_rewards,
    trained,
    whitened,
)

BUILD = {"reinforce_pp": reinforce_pp.build, "reinforce_pp_baseline": reinforce_pp.build_with_baseline}


def built(name: str, **knobs):
    return BUILD[name](AlgorithmConfig(name, **knobs))


def reference_returns(step, cfg: AlgorithmConfig) -> list[float]:
    """sum over k >= t of gamma^(k - t) r_k, where only trainable tokens are counted."""
    rewards, out = token_rewards(step, cfg), [0.0] * len(step.batch.tokens)
    for n in range(len(step.batch)):
        at = trained(step.batch, n)
        for i, t in enumerate(at):
            out[t] = sum(cfg.gamma ** (k - i) * rewards[at[k]] for k in range(i, len(at)))
    return out


def reference_baseline(step, cfg: AlgorithmConfig) -> list[float]:
    """reward - group mean - coef * kl of the token."""
    rewards, out = token_rewards(step, cfg), [0.0] * len(step.batch.tokens)
    for n in range(len(step.batch)):
        group, own, at = others(step.batch, n, itself=True), float(step.batch.rewards[n]), trained(step.batch, n)
        for t in at:
            out[t] = rewards[t] - (own if t == at[-1] else 0.0) + own - sum(group) / len(group)
    return out


REFERENCE = {"reinforce_pp": reference_returns, "reinforce_pp_baseline": reference_baseline}


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"kl_reward_coef": 0.3},
        {"kl_reward_coef": 0.3, "kl_estimator": "k1"},
        {"kl_reward_coef": 0.3, "kl_estimator": "k3", "gamma": 0.9},
        {"distill": "sampled", "distill_coef": 0.4, "gamma": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BUILD)
def test_targets_of_a_worked_example(name, knobs, whiten):
    step, cfg = make_step(), AlgorithmConfig(name, normalize=whiten, **knobs)
    expected = REFERENCE[name](step, cfg)
    if cfg.distill == "sampled":
        expected = [a + b for a, b in zip(expected, teaching(step, cfg.distill_coef), strict=True)]
    got = BUILD[name](cfg).targets(step)
    assert got.advantages.dtype == np.float64 and got.returns is None
    np.testing.assert_allclose(got.advantages, whitened(step.batch, expected) if whiten else expected, rtol=1e-6, atol=1e-9)


def test_the_kl_is_subtracted_once():
    """The first token's return is the reward less the KL of the whole answer; with a baseline each token has its own."""
    step = make_step(make_batch([[0, 1, 0, 1], [0, 0, 1]], [2.0, 1.0], [0, 0]))
    step.old_logprobs = np.float32([0, -1, 0, -1, 0, 0, -1])
    step.ref_logprobs = np.float32([0, -1.5, 0, -1.25, 0, 0, -1])
    knobs = {"kl_reward_coef": 0.5, "kl_estimator": "k1", "normalize": False}
    np.testing.assert_allclose(built("reinforce_pp", **knobs).targets(step).advantages, [0, 1.625, 0, 1.875, 0, 0, 1])
    np.testing.assert_allclose(built("reinforce_pp_baseline", **knobs).targets(step).advantages, [0, 0.25, 0, 0.375, 0, 0, -0.5])


@pytest.mark.parametrize("name", BUILD)
def test_tokens_outside_the_mask_are_0_and_without_influence(name):
    step, targets = make_step(), built(name, kl_reward_coef=0.3, distill="sampled").targets
    got = targets(spoilt(step)).advantages
    np.testing.assert_array_equal(got, targets(step).advantages)
    assert not got[~step.batch.loss_mask].any()


@pytest.mark.parametrize("name", BUILD)
def test_the_loss_after_several_updates_is_ppos(name):
    loss = built(name, clip_high=0.28).loss
    x = after_updates(loss)
    expected = [ppo_loss(ratio, a, 0.2, 0.28) for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    np.testing.assert_allclose(loss(x).loss.tolist(), expected, rtol=1e-9)
    assert gradients_agree_with_finite_differences(loss, x)


@pytest.mark.parametrize("name", BUILD)
def test_at_ratio_1_the_gradient_is_minus_the_advantage(name):
    x = make_inputs(16, shift=0.0)
    assert torch.equal(slope(built(name).loss(x).loss.sum(), x.logprobs), -x.advantages)
