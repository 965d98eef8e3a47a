"""On-policy distillation alone: the teacher's opinion as an advantage, or the divergence from it as the loss."""

import numpy as np
import pytest
import torch

from slime.algorithms import opd
from slime.config import AlgorithmConfig
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import (
    after_updates,
    gradients_agree_with_finite_differences,
    make_batch,
    make_step,
    ppo_loss,
    ratios,
    slope,
    spoilt,
    teaching,
)

SAMPLED = {"name": "opd", "distill": "sampled"}
DIVERGENCES = ["topk", "full"]


@pytest.mark.parametrize("coef", [1.0, 0.4])
def test_targets_of_a_worked_example(coef):
    step = make_step()
    got = opd.build(AlgorithmConfig(**SAMPLED, distill_coef=coef)).targets(step)
    assert got.advantages.dtype == np.float64 and got.returns is None
    np.testing.assert_allclose(got.advantages, teaching(step, coef), rtol=1e-6, atol=1e-12)


def test_rewards_and_groups_play_no_part():
    targets = opd.build(AlgorithmConfig(**SAMPLED)).targets
    other = make_step(make_batch(rewards=[-3.0] * 7, group=range(7)))
    np.testing.assert_array_equal(targets(make_step()).advantages, targets(other).advantages)


def test_tokens_outside_the_mask_are_0_and_without_influence():
    step, targets = make_step(), opd.build(AlgorithmConfig(**SAMPLED)).targets
    got = targets(spoilt(step)).advantages
    np.testing.assert_array_equal(got, targets(step).advantages)
    assert not got[~step.batch.loss_mask].any()


def test_the_loss_of_sampled_tokens_after_several_updates_is_ppos():
    loss = opd.build(AlgorithmConfig(**SAMPLED, clip_high=0.28)).loss
    x = after_updates(loss)
    expected = [ppo_loss(ratio, a, 0.2, 0.28) for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    np.testing.assert_allclose(loss(x).loss.tolist(), expected, rtol=1e-9)
    assert gradients_agree_with_finite_differences(loss, x)


@pytest.mark.parametrize("distill", DIVERGENCES)
def test_a_divergence_is_the_whole_loss(distill):
    x, algorithm = make_inputs(24), opd.build(AlgorithmConfig("opd", distill=distill, distill_coef=0.6))
    assert not algorithm.targets(make_step()).advantages.any()
    out = algorithm.loss(x)
    torch.testing.assert_close(out.loss, 0.6 * x.distillation)
    assert not out.metrics["pg_loss"].any() and torch.equal(out.metrics["distillation"], x.distillation)
    assert torch.equal(slope(out.loss.sum(), x.distillation), torch.full((24,), 0.6, dtype=torch.float64))


@pytest.mark.parametrize("distill", DIVERGENCES)
def test_a_divergence_takes_entropy_and_kl_beside_it(distill):
    knobs = {"entropy_coef": 0.1, "kl_loss_coef": 0.2}
    loss, x = opd.build(AlgorithmConfig("opd", distill=distill, **knobs)).loss, make_inputs(24)
    expected = x.distillation - 0.1 * x.entropy + 0.2 * (x.logprobs - x.ref_logprobs).square() / 2
    torch.testing.assert_close(loss(x).loss, expected)
    assert gradients_agree_with_finite_differences(lambda x: loss(x), x)
