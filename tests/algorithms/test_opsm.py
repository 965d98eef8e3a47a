"""Off-policy sequence masking: which tokens are dropped, by the formula of the paper (arXiv 2512.02556)."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms import cispo, grpo, gspo
from slime.algorithms.opsm import dropped_tokens
from slime.config import AlgorithmConfig
from tests.algorithms.local import LocalSequences, make_inputs
from tests.algorithms.test_terms import gradients_agree_with_finite_differences, replaced, slope

DELTA = 0.1
tokens = st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([-2.0, -0.1, 0.0, 0.1]), st.integers(0, 3)), min_size=1, max_size=12)


def dropped(gaps, advantages, sample, delta=DELTA) -> list[bool]:
    """`gaps` are log p_engine - log p."""
    logprobs = torch.full((len(gaps),), -5.0, dtype=torch.float64)
    rollout = logprobs + torch.tensor(gaps, dtype=torch.float64)
    return dropped_tokens(logprobs, rollout, torch.tensor(advantages), LocalSequences(torch.tensor(sample)), delta).tolist()


@settings(max_examples=100, deadline=None)
@given(tokens)
def test_m_of_the_paper(given):
    """M_t = 0 where A_t < 0 and 1 / |o| sum over o of log(p_old / p) > delta, else 1."""
    gaps, advantages, sample = ([(column[0] - 5) + 5 for column in given], [c[1] for c in given], [c[2] for c in given])
    expected = []
    for own, advantage in zip(sample, advantages, strict=True):
        mean = statistics.fmean([gap for gap, s in zip(gaps, sample, strict=True) if s == own])
        if abs(mean - DELTA) < 1e-9:
            return  # on which side it lies is a matter of rounding
        expected.append(advantage < 0 and mean > DELTA)
    assert dropped(gaps, advantages, sample) == expected


@pytest.mark.parametrize(
    ("gaps", "advantage", "expected"),
    [
        ([0.3, 0.1], -1.0, True),
        ([0.3, 0.1], 1.0, False),
        ([0.3, 0.1], 0.0, False),
        ([-0.3, -0.1], -1.0, False),  # what has become likelier stays, however much
        ([0.3, -0.15], -1.0, False),
        ([math.inf, 0.0], -1.0, True),
        ([0.1, 0.1], -1.0, False),  # up to delta itself
    ],
)
def test_bad_tokens_of_a_sequence_that_became_unlikely(gaps, advantage, expected):
    assert dropped(gaps, [advantage] * 2, [0, 0], delta=0.125) == [expected] * 2


def test_of_a_sequence_only_the_bad_tokens_go():
    assert dropped([0.4, 0.4, 0.4, 0.0], [-1.0, 1.0, -0.5, -1.0], [0, 0, 0, 1]) == [True, False, True, False]


@pytest.mark.parametrize("algorithm", [grpo, gspo, cispo], ids=["grpo", "gspo", "cispo"])
def test_what_is_dropped_has_no_gradient_and_the_rest_has_its_own(algorithm):
    x = make_inputs(24, shift=0.1)
    x.rollout_logprobs = x.logprobs.detach() + 0.2 * torch.randn(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x.advantages = x.advantages[::3].repeat_interleave(3)  # of the sequence, as all tokens of a gspo's share their gradient
    cfg = AlgorithmConfig(opsm_delta=0.05)
    out, plain = algorithm.loss(x, cfg), algorithm.loss(x, AlgorithmConfig())
    gone = out.metrics["opsm_frac"] > 0
    assert 0 < gone.sum() < 24 and out.metrics["opsm_frac"].tolist() == gone.double().tolist()
    torch.testing.assert_close(slope(out.loss.sum(), x.logprobs), torch.where(gone, 0.0, slope(plain.loss.sum(), x.logprobs)))
    if algorithm is not cispo:  # whose ratio passes no gradient
        assert gradients_agree_with_finite_differences(lambda inputs: algorithm.loss(inputs, cfg), x)


def test_with_one_optimizer_step_the_engine_still_differs():
    """p_old is p then, and OPSM is not without effect: it compares with the engine's log-probs."""
    x = make_inputs(6, shift=0.0)
    x.rollout_logprobs, x.advantages = x.logprobs.detach() + 0.3, torch.full((6,), -1.0, dtype=torch.float64)
    cfg = AlgorithmConfig(opsm_delta=0.2)
    assert not grpo.loss(x, cfg).loss.any()
    agreeing = replaced(x, rollout_logprobs=x.logprobs.detach())
    assert torch.equal(grpo.loss(agreeing, cfg).loss, grpo.loss(agreeing, AlgorithmConfig()).loss)
