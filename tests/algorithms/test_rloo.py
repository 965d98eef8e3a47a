"""RLOO: advantages over the other answers of a worked example, with GRPO's loss."""

import numpy as np
import pytest
import torch

from slime.algorithms import rloo
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


def reference_advantages(batch) -> list[float]:
    """Equation 6 of arXiv 2402.14740; an answer without another is 0."""
    rest = [others(batch, n, itself=False) for n in range(len(batch))]
    return spread(batch, [float(batch.rewards[n]) - sum(r) / len(r) if r else 0.0 for n, r in enumerate(rest)])


@pytest.mark.parametrize("coef", [None, 0.4], ids=["rewards alone", "with a teacher"])
def test_targets_of_a_worked_example(coef):
    step = make_step()
    cfg = AlgorithmConfig("rloo") if coef is None else AlgorithmConfig("rloo", distill="sampled", distill_coef=coef)
    got = rloo.build(cfg).targets(step)
    expected = np.array(reference_advantages(step.batch)) + teaching(step, coef or 0.0)
    assert got.advantages.dtype == np.float64 and got.returns is None
    np.testing.assert_allclose(got.advantages, expected, rtol=1e-6, atol=1e-12)


def test_targets_by_hand():
    step = make_step(make_batch([[0, 1, 1], [0, 1], [0, 1], [0, 1]], [1.0, 0.0, 2.0, 8.0], [3, 3, 3, 5]))
    np.testing.assert_allclose(rloo.targets(step, AlgorithmConfig()).advantages, [0, 0, 0, 0, -1.5, 0, 1.5, 0, 0], atol=1e-12)


def test_tokens_outside_the_mask_are_0_and_without_influence():
    cfg, step = AlgorithmConfig("rloo", distill="sampled"), make_step()
    got = rloo.targets(spoilt(step), cfg).advantages
    np.testing.assert_array_equal(got, rloo.targets(step, cfg).advantages)
    assert not got[~step.batch.loss_mask].any()


def test_the_loss_after_several_updates_is_ppos():
    loss = rloo.build(AlgorithmConfig("rloo", clip_high=0.28)).loss
    x = after_updates(loss)
    expected = [ppo_loss(ratio, a, 0.2, 0.28) for ratio, a in zip(ratios(x), x.advantages.tolist(), strict=True)]
    np.testing.assert_allclose(loss(x).loss.tolist(), expected, rtol=1e-9)
    assert gradients_agree_with_finite_differences(loss, x)


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    x = make_inputs(16, shift=0.0)
    out = rloo.build(AlgorithmConfig("rloo")).loss(x)
    assert torch.equal(slope(out.loss.sum(), x.logprobs), -x.advantages)
