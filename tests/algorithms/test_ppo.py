"""PPO with a critic: advantages and returns of a worked example, against the definition of GAE as a sum."""

import numpy as np
import pytest
import torch

from slime.algorithms import ppo
from slime.config import AlgorithmConfig
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import (
    after_updates,
    gradients_agree_with_finite_differences,
    make_step,
    ppo_loss,
    ratios,
    slope,
    spoilt,
    teaching,
    token_rewards,
    trained,
    whitened,
)


def reference_gae(step, cfg: AlgorithmConfig) -> tuple[list[float], list[float]]:
    """Equation 16 of arXiv 1506.02438: A_t = sum over k of (gamma lam)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t; R = A + V."""
    rewards, values = token_rewards(step, cfg), step.values.tolist()
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for n in range(len(step.batch)):
        at = trained(step.batch, n)
        following = ([values[t] for t in at[1:]] + [0.0])[: len(at)]
        d = [rewards[t] + cfg.gamma * after - values[t] for t, after in zip(at, following, strict=True)]
        for i, t in enumerate(at):
            advantages[t] = sum((cfg.gamma * cfg.lam) ** (k - i) * d[k] for k in range(i, len(at)))
            returns[t] = advantages[t] + values[t]
    return advantages, returns


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"gamma": 0.9},
        {"lam": 0.0},
        {"gamma": 0.9, "lam": 0.7},
        {"kl_reward_coef": 0.3, "lam": 0.7},
        {"kl_reward_coef": 0.3, "kl_estimator": "k1", "gamma": 0.9},
        {"distill": "sampled", "distill_coef": 0.4, "lam": 0.7},
    ],
    ids=str,
)
def test_targets_of_a_worked_example(knobs, whiten):
    step, cfg = make_step(), AlgorithmConfig("ppo", normalize=whiten, **knobs)
    advantages, returns = reference_gae(step, cfg)
    if cfg.distill == "sampled":
        advantages = [a + b for a, b in zip(advantages, teaching(step, cfg.distill_coef), strict=True)]
    got = ppo.build(cfg).targets(step)
    assert got.advantages.dtype == got.returns.dtype == np.float64
    np.testing.assert_allclose(got.advantages, whitened(step.batch, advantages) if whiten else advantages, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got.returns, returns, rtol=1e-6, atol=1e-9)  # neither whitened nor taught


def test_without_discount_returns_are_the_reward():
    step = make_step()
    returns = ppo.targets(step, AlgorithmConfig("ppo")).returns
    expected = [reward for n, reward in enumerate(step.batch.rewards) for _ in trained(step.batch, n)]
    np.testing.assert_allclose(returns[step.batch.loss_mask], expected, rtol=1e-9)


def test_tokens_outside_the_mask_are_0_and_without_influence():
    step, targets = make_step(), ppo.build(AlgorithmConfig("ppo", kl_reward_coef=0.3, distill="sampled", lam=0.7)).targets
    got, expected = targets(spoilt(step)), targets(step)
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert not getattr(got, name)[~step.batch.loss_mask].any()


def test_the_loss_after_several_updates_follows_the_paper():
    loss = ppo.build(AlgorithmConfig("ppo")).loss
    x = after_updates(loss)
    expected = [ppo_loss(ratio, a, 0.2, 0.2) for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    np.testing.assert_allclose(loss(x).loss.tolist(), expected, rtol=1e-9)
    assert gradients_agree_with_finite_differences(loss, x)


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    x = make_inputs(16, shift=0.0)
    assert torch.equal(slope(ppo.build(AlgorithmConfig("ppo")).loss(x).loss.sum(), x.logprobs), -x.advantages)


def test_it_asks_for_a_critic():
    assert ppo.build(AlgorithmConfig("ppo")).uses_critic
    with pytest.raises(AssertionError, match="asked for"):
        step = make_step()
        step.values = None
        ppo.targets(step, AlgorithmConfig("ppo"))
