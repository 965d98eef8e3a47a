"""Estimates of a KL divergence: their formulas, and exactly by enumeration what they and their gradients are on average."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.kl import ESTIMATORS, k1, k2, k3, unbiased
from tests.algorithms.local import expected_gradient, forward_kl_gradient, kl, make_logits, reverse_kl_gradient, softmax

POLICY, REFERENCE, OLD = make_logits(3, 7, seed=4)
P, Q, MU = (softmax(z.tolist()) for z in (POLICY, REFERENCE, OLD))
LOG_P, LOG_Q, LOG_MU = (torch.tensor([math.log(x) for x in y], dtype=torch.float64) for y in (P, Q, MU))
FORMULAS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def expectation(weights: list[float], values: torch.Tensor) -> float:
    return math.fsum(w * v for w, v in zip(weights, values.tolist(), strict=True))


def assert_close(got, expected) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-15, 0), st.floats(-15, 0)), min_size=1, max_size=8))
def test_every_estimator_follows_its_formula(rows):
    logprobs, ref = torch.tensor(rows, dtype=torch.float64).T
    for name, estimator in ESTIMATORS.items():
        assert_close(estimator(logprobs, ref).tolist(), [FORMULAS[name](a - b) for a, b in rows])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_agree_with_finite_differences(name):
    assert torch.autograd.gradcheck(lambda x: ESTIMATORS[name](x, LOG_Q), LOG_P.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: unbiased(ESTIMATORS[name](x, LOG_Q), x, LOG_MU), LOG_P.clone().requires_grad_())


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_the_kl_on_average(estimator):
    assert_close(expectation(P, estimator(LOG_P, LOG_Q)), kl(P, Q))


def test_k2_is_biased_and_less_so_the_nearer_the_policies():
    errors = []
    for step in (1.0, 0.1, 0.01):
        q = softmax([a + step * (b - a) for a, b in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True)])
        log_q = torch.tensor([math.log(x) for x in q], dtype=torch.float64)
        errors.append(abs(expectation(P, k2(LOG_P, log_q)) / kl(P, q) - 1))
    assert errors[0] > 0.1 and errors[0] > errors[1] > 5 * errors[2]


def test_k1_as_a_loss_teaches_nothing():
    """The default regulariser of peers: its gradient is 0 on average, whatever the reference."""
    assert_close(expected_gradient(POLICY, lambda x: k1(x, LOG_Q)), [0.0] * 7)
    assert max(map(abs, reverse_kl_gradient(P, Q))) > 0.1


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    assert_close(expected_gradient(POLICY, lambda x: k2(x, LOG_Q)), reverse_kl_gradient(P, Q))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    got = expected_gradient(POLICY, lambda x: k3(x, LOG_Q))
    assert_close(got, forward_kl_gradient(P, Q))
    assert max(abs(a - b) for a, b in zip(got, reverse_kl_gradient(P, Q), strict=True)) > 0.1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_the_reward_k1_alone_has_the_gradient_of_the_reverse_kl(name):
    """The estimate is a number there, whose policy gradient is taken. Of k2 and k3 it lowers tokens too that are rarer than in the
    reference."""
    got = expected_gradient(POLICY, lambda x: ESTIMATORS[name](LOG_P, LOG_Q) * x)
    exact = reverse_kl_gradient(P, Q)
    rarest = min(range(len(P)), key=lambda a: P[a] / Q[a])
    if name == "k1":
        assert_close(got, exact)
    else:
        assert exact[rarest] < 0 < got[rarest]


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("drawn_from", [P, MU], ids=["itself", "an older policy"])
def test_unbiased_k1_and_k3_have_value_and_gradient_of_the_reverse_kl_whoever_drew_the_tokens(estimator, drawn_from):
    old = torch.tensor([math.log(x) for x in drawn_from], dtype=torch.float64)
    assert_close(expectation(drawn_from, unbiased(estimator(LOG_P, LOG_Q), LOG_P, old)), kl(P, Q))
    assert_close(expected_gradient(POLICY, lambda x: unbiased(estimator(x, LOG_Q), x, old), drawn_from), reverse_kl_gradient(P, Q))


def test_unbiased_k2_has_value_and_gradient_of_half_the_mean_squared_log_ratio_and_not_of_the_kl():
    d = [math.log(a / b) for a, b in zip(P, Q, strict=True)]
    mean = math.fsum(p * x * x / 2 for p, x in zip(P, d, strict=True))
    assert_close(expectation(MU, unbiased(k2(LOG_P, LOG_Q), LOG_P, LOG_MU)), mean)
    slope = [p * (x * x / 2 + x - mean - kl(P, Q)) for p, x in zip(P, d, strict=True)]
    got = expected_gradient(POLICY, lambda x: unbiased(k2(x, LOG_Q), x, LOG_MU), MU)
    assert_close(got, slope)
    assert max(abs(a - b) for a, b in zip(got, reverse_kl_gradient(P, Q), strict=True)) > 0.01


def test_a_biased_k2_on_another_policys_tokens_is_not_the_reverse_kl():
    got = expected_gradient(POLICY, lambda x: k2(x, LOG_Q), MU)
    assert max(abs(a - b) for a, b in zip(got, reverse_kl_gradient(P, Q), strict=True)) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype):
    gaps = torch.cat([sign * torch.logspace(-12, 1.5, 20_001, dtype=torch.float64) for sign in (1, -1)]).to(dtype)
    assert (k3(gaps, torch.zeros_like(gaps)) >= 0).all()
    assert (k3(gaps, torch.zeros_like(gaps))[gaps.abs() > 1e-2] > 0).all()


@pytest.mark.parametrize("d", [1e-3, -1e-3])
def test_k3_of_a_small_fp32_difference_keeps_its_digits(d):
    exact = math.expm1(-d) + d
    assert abs(k3(torch.tensor([d]), torch.zeros(1)).item() / exact - 1) < 1e-3
    assert abs((torch.exp(torch.tensor(-d)) - 1 + d).item() / exact - 1) > 1e-2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_policies_are_at_distance_zero(name):
    assert (ESTIMATORS[name](LOG_P, LOG_P) == 0).all()


@pytest.mark.parametrize("gap", [300.0, -300.0, math.inf, -math.inf])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_absurd_difference_is_held_at_20_and_passes_no_gradient(name, gap):
    logprobs = torch.tensor([gap], requires_grad=True)
    for value in (
        ESTIMATORS[name](logprobs, torch.zeros(1)),
        unbiased(ESTIMATORS[name](logprobs, torch.zeros(1)), logprobs, torch.zeros(1)),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logprobs)
        assert torch.isfinite(value).all() and gradient.item() == 0
    np.testing.assert_allclose(ESTIMATORS[name](logprobs, torch.zeros(1)).item(), FORMULAS[name](math.copysign(20, gap)), rtol=1e-5)
