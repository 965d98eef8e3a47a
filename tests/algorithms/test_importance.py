"""Weights for tokens that another policy drew: token by token, and exactly by enumeration what they are on average."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.importance import BOUNDS, LEVELS, importance_weights
from slime.algorithms.policy_loss import Clip, clipped, ratio_of
from tests.algorithms.local import LocalSequences, expected_gradient, make_logits, softmax

UNBOUNDED = ("truncate", 0.0, math.inf)
tokens = st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=12)


def reference(gaps: list[float], sample: list[int], level: str, bound: str, low: float, high: float) -> tuple[list, list]:
    weights, bounded = [], []
    for gap, own in zip(gaps, sample, strict=True):
        d = [g for g, s in zip(gaps, sample, strict=True) if s == own]
        w = math.exp({"token": gap, "sequence": math.fsum(d), "geometric": math.fsum(d) / len(d)}[level])
        outside = not low <= w <= high
        weights.append(0.0 if outside and bound == "mask" else min(max(w, low), high))
        bounded.append(float(outside))
    return weights, bounded


def weights_of(gaps, sample, *how) -> tuple[torch.Tensor, torch.Tensor]:
    gaps = torch.as_tensor(gaps, dtype=torch.float64)
    return importance_weights(gaps - 5, torch.full_like(gaps, -5.0), LocalSequences(torch.as_tensor(sample)), *how)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bound", BOUNDS)
@settings(max_examples=50, deadline=None)
@given(tokens)
def test_every_level_and_bound_follows_its_formula(level, bound, tokens):
    gaps = [((g - 5) - -5.0) for g, _ in tokens]
    sample = [s for _, s in tokens]
    got = weights_of(gaps, sample, level, bound, 0.7, 1.6)
    expected = reference(gaps, sample, level, bound, 0.7, 1.6)
    np.testing.assert_allclose(got[0].tolist(), expected[0], rtol=1e-9)
    assert got[1].tolist() == expected[1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_an_engine_that_agrees_changes_nothing(level, bound):
    logprobs = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    weights, bounded = importance_weights(logprobs, logprobs, LocalSequences(torch.arange(9) // 4), level, bound, 0.5, 2.0)
    assert (weights == 1).all() and (bounded == 0).all()


def test_the_weight_of_a_token_is_one_on_average():
    trainer, engine = (softmax(z.tolist()) for z in make_logits(2, 8))
    gaps = [math.log(a / b) for a, b in zip(trainer, engine, strict=True)]
    weights, _ = weights_of(gaps, list(range(8)), "token", *UNBOUNDED)
    assert math.fsum(b * w for b, w in zip(engine, weights.tolist(), strict=True)) == pytest.approx(1, abs=1e-12)


def test_the_weight_of_a_sequence_is_one_on_average_and_the_geometric_one_is_less():
    """Over all 27 sequences of three tokens, each token drawn from a distribution that depends on the one before."""
    trainer, engine = ([softmax(z) for z in table.tolist()] for table in make_logits(2, 4, 3))
    drawn, gaps = [], []
    for sequence in product(range(3), repeat=3):
        rows = [3, *sequence[:-1]]
        drawn.append(math.prod(engine[row][a] for row, a in zip(rows, sequence, strict=True)))
        gaps += [math.log(trainer[row][a] / engine[row][a]) for row, a in zip(rows, sequence, strict=True)]
    sample = [i for i in range(27) for _ in range(3)]

    def mean(level: str) -> float:
        weights = weights_of(gaps, sample, level, *UNBOUNDED)[0].tolist()
        return math.fsum(p * w for p, w in zip(drawn, weights[::3], strict=True))

    assert mean("sequence") == pytest.approx(1, abs=1e-12)
    assert mean("geometric") < 0.99


def test_truncation_holds_weights_at_both_ends_and_masking_drops_them():
    gaps = [math.log(w) for w in (0.1, 0.5, 1.0, 2.0, 8.0)]
    for bound, expected in (("truncate", [0.4, 0.5, 1.0, 2.0, 3.0]), ("mask", [0.0, 0.5, 1.0, 2.0, 0.0])):
        weights, bounded = weights_of(gaps, range(5), "token", bound, 0.4, 3.0)
        np.testing.assert_allclose(weights.tolist(), expected, rtol=1e-12)
        assert bounded.tolist() == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(("level", "expected"), [("sequence", [8, 8, 8, 0.25, 8]), ("geometric", [8**0.25] * 3 + [0.25, 8**0.25])])
def test_all_tokens_of_a_sequence_share_its_weight_wherever_they_lie(level, expected):
    weights, _ = weights_of([math.log(w) for w in (4, 4, 0.25, 0.25, 2)], [7, 7, 7, 1, 7], level, *UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), expected, rtol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_no_sequence_feels_another(level):
    sample = [0, 1, 0, 1, 0]
    one, other = (weights_of(gaps, sample, level, *UNBOUNDED)[0] for gaps in ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, -0.7, 0.3, 3.0, 0.5]))
    assert one[::2].tolist() == other[::2].tolist() and (one[1::2] != other[1::2]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_weights_carry_no_gradient(level):
    old, rollout = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for out in importance_weights(old, rollout, LocalSequences(torch.tensor([0, 0, 1, 1])), level, "truncate", 0.5, 2.0):
        assert not out.requires_grad


@pytest.mark.parametrize("gap", [300.0, -300.0, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_an_absurd_difference_gives_a_finite_weight_that_the_bounds_see(gap, level):
    weights, _ = weights_of([gap, gap], [0, 0], level, *UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), math.exp(math.copysign(20, gap)), rtol=1e-12)
    for bound in BOUNDS:
        assert weights_of([gap, gap], [0, 0], level, bound, 0.5, 2.0)[1].tolist() == [1, 1]


def test_an_absurd_token_is_held_before_its_sequence_is_summed():
    weights, _ = weights_of([300.0, -20.0, -1.0, -1.0], [0, 0, 0, 0], "sequence", *UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), math.exp(-2), rtol=1e-12)


def test_weight_times_clipped_loss_is_decoupled_ppo():
    """Tokens of the engine, ratios to the trainer's old weights: on average the gradient of PPO on tokens of those (arXiv 2110.00641)."""
    policy, old, engine = make_logits(3, 6, seed=2)
    log_old, log_engine = old.log_softmax(-1), engine.log_softmax(-1)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1, -1.0], dtype=torch.float64)
    weights, _ = importance_weights(log_old, log_engine, LocalSequences(torch.arange(6)), "token", *UNBOUNDED)

    def ppo(logprobs):
        return clipped(ratio_of(logprobs - log_old), advantages, Clip(0.2, 0.2))[0]

    corrected = expected_gradient(policy, lambda x: weights * ppo(x), softmax(engine.tolist()))
    on_old, uncorrected = (expected_gradient(policy, ppo, softmax(z.tolist())) for z in (old, engine))
    np.testing.assert_allclose(corrected, on_old, atol=1e-12)
    assert max(abs(a - b) for a, b in zip(uncorrected, on_old, strict=True)) > 0.01
