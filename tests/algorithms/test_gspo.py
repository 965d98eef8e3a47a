"""GSPO: GRPO's advantages, and one ratio for every token of a sequence."""

import math
import statistics

import numpy as np
import pytest
import torch

from slime.algorithms import grpo, gspo
from slime.algorithms.base import LossInputs
from slime.config import AlgorithmConfig
from tests.algorithms.local import LocalSequences, make_inputs
from tests.algorithms.test_terms import after_updates, gradients_agree_with_finite_differences, make_step, ppo_loss, slope


def sequence_ratios(x: LossInputs) -> list[float]:
    """(pi(y) / pi_old(y))^(1 / |y|) of each token's sequence, equation 7 of arXiv 2507.18071."""
    d, of = (x.logprobs - x.old_logprobs).tolist(), x.sequences.of.tolist()
    return [math.exp(statistics.fmean([d[i] for i in range(len(d)) if of[i] == own])) for own in of]


def test_targets_are_grpos():
    step = make_step()
    for cfg in (AlgorithmConfig("gspo"), AlgorithmConfig("gspo", normalize=False), AlgorithmConfig("gspo", distill="sampled")):
        np.testing.assert_array_equal(gspo.build(cfg).targets(step).advantages, grpo.targets(step, cfg).advantages)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, (3e-4, 4e-4, None)),
        ({"clip_low": 0.1}, (0.1, 4e-4, None)),
        ({"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 1.05}, (0.2, 0.3, 1.05)),
    ],
    ids=str,
)
def test_the_loss_follows_the_paper(given, bounds):
    loss = gspo.build(AlgorithmConfig("gspo", **given)).loss
    for x in (after_updates(loss), make_inputs(24, shift=0.5)):
        expected = [ppo_loss(ratio, a, *bounds) for ratio, a in zip(sequence_ratios(x), x.advantages.tolist(), strict=True)]
        np.testing.assert_allclose(loss(x).loss.tolist(), expected, rtol=1e-9)


def test_gradients_agree_with_finite_differences():
    loss = gspo.build(AlgorithmConfig("gspo", clip_low=0.05, kl_loss_coef=0.1, entropy_coef=0.05)).loss
    x = make_inputs(24, shift=0.5)
    assert 0 < loss(x).metrics["clip_frac"].sum() < 24
    assert gradients_agree_with_finite_differences(loss, x)
    assert gradients_agree_with_finite_differences(loss, after_updates(loss))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_tokens_gradient_is_spread_over_its_sequence(n):
    """At ratio 1 the loss of one token has the gradient -A / n on each of the sequence's n tokens, and none elsewhere."""
    x = make_inputs(8, shift=0.0, sequences=LocalSequences(torch.arange(8) // n))
    loss = gspo.loss(x, AlgorithmConfig("gspo")).loss
    expected = torch.where(x.sequences.of == x.sequences.of[5], -x.advantages[5] / n, 0.0)
    torch.testing.assert_close(slope(loss[5], x.logprobs), expected)


def test_with_the_advantage_of_a_sequence_the_gradient_of_its_mean_carries_1_over_its_length():
    x = make_inputs(8, shift=0.0, sequences=LocalSequences(torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])))
    x.advantages = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[x.sequences.of]
    lengths = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[x.sequences.of]
    mean = (gspo.loss(x, AlgorithmConfig("gspo")).loss / lengths).sum()
    torch.testing.assert_close(slope(mean, x.logprobs), -x.advantages / lengths)


def test_sequences_of_one_token_have_ppos_loss_and_gradient():
    x = make_inputs(24, shift=0.5, sequences=LocalSequences(torch.arange(24)))
    cfg = AlgorithmConfig("gspo", clip_low=0.2, clip_high=0.3, clip_dual=1.5)
    ours, ppos = gspo.loss(x, cfg), grpo.loss(x, cfg)
    assert torch.equal(ours.loss, ppos.loss) and torch.equal(ours.metrics["clip_frac"], ppos.metrics["clip_frac"])
    assert torch.equal(slope(ours.loss.sum(), x.logprobs), slope(ppos.loss.sum(), x.logprobs))


def test_sequences_need_not_be_neighbours():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    x = make_inputs(24, shift=0.5)
    moved = LossInputs(
        **{name: getattr(x, name)[order] for name in LossInputs.__slots__ if name not in ("sequences", "importance_scale")},
        sequences=LocalSequences(x.sequences.of[order]),
    )
    cfg = AlgorithmConfig("gspo", clip_low=0.1)
    torch.testing.assert_close(gspo.loss(moved, cfg).loss, gspo.loss(x, cfg).loss[order])
