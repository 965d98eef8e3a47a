"""GRPO and its relatives by their knobs: advantages of a worked example, and the clipped loss, against the papers' formulas."""

import numpy as np
import pytest
import torch

from slime.algorithms import grpo
from slime.algorithms.base import LossInputs
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
    spread,
    teaching,
)


def reference_advantages(batch, normalize: bool) -> list[float]:
    """Section 4.1.2 of arXiv 2402.03300 (outcome supervision); without the division, arXiv 2503.20783."""
    out = []
    for n in range(len(batch)):
        rewards = others(batch, n, itself=True)
        mean = sum(rewards) / len(rewards)
        std = (sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1)) ** 0.5
        out.append((float(batch.rewards[n]) - mean) / (std + 1e-6 if normalize else 1.0))
    return spread(batch, out)


@pytest.mark.parametrize("normalize", [True, False])
def test_targets_of_a_worked_example(normalize):
    step = make_step()
    got = grpo.build(AlgorithmConfig(normalize=normalize)).targets(step)
    assert got.advantages.dtype == np.float64 and got.returns is None
    np.testing.assert_allclose(got.advantages, reference_advantages(step.batch, normalize), rtol=1e-6, atol=1e-12)


def test_targets_by_hand():
    """Rewards 1 and 0 of one prompt: mean 1/2, unbiased standard deviation 1 / sqrt(2). A prompt's other answers say nothing."""
    step = make_step(make_batch([[0, 1, 1], [0, 1], [0, 1]], [1.0, 0.0, 8.0], [3, 3, 5]))
    got = grpo.targets(step, AlgorithmConfig()).advantages
    np.testing.assert_allclose(got, [0, 0.5**0.5, 0.5**0.5, 0, -(0.5**0.5), 0, 0], rtol=1e-5)


def test_a_teacher_is_added_to_the_advantages():
    step = make_step()
    got = grpo.targets(step, AlgorithmConfig(distill="sampled", distill_coef=0.4)).advantages
    expected = np.array(reference_advantages(step.batch, True)) + teaching(step, 0.4)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


def test_tokens_outside_the_mask_are_0_and_without_influence():
    cfg, step = AlgorithmConfig(distill="sampled"), make_step()
    got = grpo.targets(spoilt(step), cfg).advantages
    np.testing.assert_array_equal(got, grpo.targets(step, cfg).advantages)
    assert not got[~step.batch.loss_mask].any()


CLIPS = [
    ({}, (0.2, 0.2, None)),
    ({"clip_low": 0.1}, (0.1, 0.1, None)),
    ({"clip_high": 0.28}, (0.2, 0.28, None)),
    ({"clip_dual": 1.3}, (0.2, 0.2, 1.3)),
]


@pytest.mark.parametrize("far", [False, True], ids=["after several updates", "far"])
@pytest.mark.parametrize(("given", "bounds"), CLIPS, ids=str)
def test_the_loss_follows_the_papers(given, bounds, far):
    loss = grpo.build(AlgorithmConfig(**given)).loss
    x = make_inputs(24, shift=1.0) if far else after_updates(loss)
    out = loss(x)
    assert 0 < out.metrics["clip_frac"].sum() < 24  # both branches are under test
    expected = [ppo_loss(ratio, a, *bounds) for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    np.testing.assert_allclose(out.loss.tolist(), expected, rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("far", [False, True], ids=["after several updates", "far"])
@pytest.mark.parametrize(("given", "bounds"), CLIPS, ids=str)
def test_gradients_agree_with_finite_differences(given, bounds, far):
    loss = grpo.build(AlgorithmConfig(**given, entropy_coef=0.05, kl_loss_coef=0.1, importance="token")).loss
    assert gradients_agree_with_finite_differences(loss, make_inputs(24, shift=1.0) if far else after_updates(loss))


def test_dual_clip_changes_the_loss_of_bad_tokens_alone():
    x = make_inputs(24, shift=1.0)
    plain, dual = (grpo.loss(x, AlgorithmConfig(clip_dual=bound)).loss for bound in (None, 1.3))
    expected = [a < 0 and ratio > 1.3 for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    assert (plain != dual).tolist() == expected and any(expected)


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_at_ratio_1_the_gradient_is_minus_the_advantage(clip):
    x = make_inputs(16, shift=0.0)
    out = grpo.loss(x, AlgorithmConfig(clip_low=clip))
    assert torch.equal(slope(out.loss.sum(), x.logprobs), -x.advantages)
    assert not out.metrics["clip_frac"].any() and not out.metrics["kl"].any()


def test_a_clipped_token_passes_no_gradient_and_is_counted():
    x = make_inputs(4)
    x.old_logprobs = x.logprobs.detach() - torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)  # ratios e, e, 1/e, 1/e
    x.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    out = grpo.loss(x, AlgorithmConfig())
    assert (slope(out.loss.sum(), x.logprobs) == 0).tolist() == [True, False, False, True]
    assert out.metrics["clip_frac"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_an_absurd_ratio_stays_finite(gap, advantage):
    logprobs, zero = torch.tensor([-1.0], requires_grad=True), torch.zeros(1)
    x = LossInputs(logprobs, torch.tensor([-1.0 - gap]), zero, torch.tensor([advantage]), zero, make_inputs(1).sequences, zero)
    out = grpo.loss(x, AlgorithmConfig(kl_loss_coef=0.1, importance="token"))
    assert all(torch.isfinite(v).all() for v in (out.loss, slope(out.loss.sum(), logprobs), *out.metrics.values()))


def test_metrics_are_per_token_and_carry_no_gradient():
    out = grpo.loss(make_inputs(5), AlgorithmConfig(entropy_coef=0.1))
    assert out.metrics.keys() == {"pg_loss", "entropy", "clip_frac", "kl"}
    assert all(v.shape == (5,) and not v.requires_grad for v in out.metrics.values())
