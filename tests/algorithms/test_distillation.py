"""Divergences from a teacher: loops in float64, exact gradients by enumeration, and what is left when only some tokens are known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slime.algorithms.distillation import DIVERGENCES, LEAST_TAIL, divergence, sampled_reverse_kl, with_tail
from slime.algorithms.policy_loss import Clip, clipped, policy_gradient, ratio_of
from tests.algorithms.local import expected_gradient, forward_kl_gradient, kl, make_logits, reverse_kl_gradient, softmax

logits = st.lists(st.floats(-6, 6), min_size=6, max_size=6)


def reference(kind: str, student: list[float], teacher: list[float], beta: float) -> float:
    if kind == "reverse":
        return kl(student, teacher)
    if kind == "forward":
        return kl(teacher, student)
    middle = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def log(rows: list[float]) -> Tensor:
    """[1, v], log-probs of a distribution."""
    return torch.tensor([[math.log(p) if p else -math.inf for p in rows]], dtype=torch.float64)


@pytest.mark.parametrize(("kind", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(logits, logits), min_size=1, max_size=3))
def test_every_divergence_follows_its_paper(kind, beta, rows):
    students, teachers = ([softmax(row[i]) for row in rows] for i in (0, 1))
    got = divergence(torch.cat([*map(log, students)]), torch.cat([*map(log, teachers)]), kind, beta)
    assert got.shape == (len(rows),)
    expected = [reference(kind, s, t, beta) for s, t in zip(students, teachers, strict=True)]
    np.testing.assert_allclose(got.tolist(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DIVERGENCES)
@settings(max_examples=50, deadline=None)
@given(logits, logits)
def test_no_divergence_is_negative_and_only_equals_are_at_zero(kind, student, teacher):
    p, q = log(softmax(student)), log(softmax(teacher))
    assert divergence(p, p, kind).item() == pytest.approx(0, abs=1e-15)
    distance = 0.5 * (p.exp() - q.exp()).abs().sum().item()
    assert divergence(p, q, kind).item() >= 0.5 * distance**2 - 1e-12  # Pinsker, four times as loose as for a KL


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_gradients_agree_with_finite_differences(kind, beta):
    student, teacher = make_logits(2, 3, 7)
    assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), teacher.log_softmax(-1), kind, beta), student.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z: divergence(with_tail(z.log_softmax(-1)[:, :4]), with_tail(teacher.log_softmax(-1)[:, :4]), kind, beta), student
    )


@pytest.mark.parametrize(("kind", "closed_form"), [("reverse", reverse_kl_gradient), ("forward", forward_kl_gradient)])
def test_gradients_have_their_closed_form(kind, closed_form):
    student, teacher = make_logits(2, 7)
    student.requires_grad_()
    (got,) = torch.autograd.grad(divergence(student.log_softmax(-1)[None], teacher.log_softmax(-1)[None], kind).sum(), student)
    np.testing.assert_allclose(got.tolist(), closed_form(softmax(student.tolist()), softmax(teacher.tolist())), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(logits, logits, st.floats(0.05, 0.95))
def test_jsd_is_symmetric_at_one_half_and_mirrored_elsewhere(student, teacher, beta):
    p, q = log(softmax(student)), log(softmax(teacher))
    assert divergence(p, q, "jsd").item() == pytest.approx(divergence(q, p, "jsd").item(), rel=1e-9, abs=1e-12)
    assert divergence(p, q, "jsd", beta).item() == pytest.approx(divergence(q, p, "jsd", 1 - beta).item(), rel=1e-9, abs=1e-12)
    assert divergence(p, q, "jsd").item() <= math.log(2)


def test_jsd_tends_to_the_forward_kl_for_a_small_beta_and_to_the_reverse_for_a_large_one():
    """Arithmetic of arXiv 2306.13649, section 2: jsd / beta -> KL(teacher || student) as beta -> 0."""
    p, q = softmax([3.0, 0.0, -1.0]), softmax([0.0, 1.0, 0.5])
    assert abs(kl(q, p) - kl(p, q)) > 0.05
    assert divergence(log(p), log(q), "jsd", 1e-6).item() / 1e-6 == pytest.approx(kl(q, p), rel=1e-4)
    assert divergence(log(p), log(q), "jsd", 1 - 1e-6).item() / 1e-6 == pytest.approx(kl(p, q), rel=1e-4)


def test_a_mode_of_the_teacher_costs_the_forward_kl_more_and_a_rare_token_the_reverse():
    one_mode, two_modes = [0.9, 0.05, 0.05], [0.48, 0.48, 0.04]
    assert divergence(log(one_mode), log(two_modes), "forward") > divergence(log(one_mode), log(two_modes), "reverse")
    assert divergence(log(two_modes), log(one_mode), "reverse") > divergence(log(two_modes), log(one_mode), "forward")


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_token_that_neither_ever_draws_adds_nothing(kind):
    p, q = softmax([1.0, 0.0, -1.0]), softmax([0.0, 0.5, 1.0])
    assert divergence(log([*p, 0.0]), log([*q, 0.0]), kind).item() == pytest.approx(divergence(log(p), log(q), kind).item(), rel=1e-12)


def test_an_unknown_divergence_is_our_bug():
    with pytest.raises(AssertionError, match="chi2"):
        divergence(log([0.5, 0.5]), log([0.5, 0.5]), "chi2")


@settings(max_examples=50, deadline=None)
@given(logits, st.integers(1, 5))
def test_the_outcomes_with_the_tail_are_a_distribution(row, k):
    p = softmax(row)
    got = with_tail(log(p)[:, :k])[0]
    np.testing.assert_allclose(got[:k].exp().tolist(), p[:k], rtol=1e-12)
    assert got.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert got[k].exp().item() == pytest.approx(math.fsum(p[k:]), abs=1e-14)


@pytest.mark.parametrize("kind", DIVERGENCES)
@settings(max_examples=50, deadline=None)
@given(logits, logits, st.integers(1, 5))
def test_what_is_known_at_k_tokens_never_exceeds_the_whole_divergence(kind, student, teacher, k):
    """The data-processing inequality; the tail of a single token hides nothing."""
    p, q = log(softmax(student)), log(softmax(teacher))
    whole = divergence(p, q, kind).item()
    known = [divergence(with_tail(p[:, :n]), with_tail(q[:, :n]), kind).item() for n in range(1, 6)]
    assert -1e-12 <= known[k - 1] <= whole + 1e-9
    assert all(a <= b + 1e-9 for a, b in pairwise(known))
    assert known[-1] == pytest.approx(whole, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_with_all_its_mass_elsewhere_is_told_so(kind):
    """Renormalised over the known tokens the two would be equal. (Elsewhere is where the teacher puts a thousandth.)"""
    teacher = [0.6, 0.399, 0.001]
    student = [0.6e-6, 0.399e-6, 1 - 0.999e-6]
    got = divergence(with_tail(log(student)[:, :2]), with_tail(log(teacher)[:, :2]), kind).item()
    assert got == pytest.approx(reference(kind, student, teacher, 0.5), rel=1e-6)
    assert got > 0.6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_known_tokens_that_hold_all_mass_leave_a_finite_tail(kind):
    whole = torch.zeros(1, 4).log_softmax(-1)
    sharp = torch.tensor([[200.0, 0.0, 0.0, 0.0]]).log_softmax(-1).requires_grad_()
    over = torch.tensor([[0.1, -5.0, -5.0, -5.0]])  # fp32 sums may exceed 1
    for student in (whole, sharp, over):
        assert with_tail(student)[0, -1].item() == pytest.approx(math.log(LEAST_TAIL), rel=1e-6)
    out = divergence(with_tail(sharp), with_tail(whole), kind)
    (slope,) = torch.autograd.grad(out.sum(), sharp)
    assert torch.isfinite(out).all() and torch.isfinite(slope).all()


def test_a_tail_of_a_millionth_is_known():
    tail = with_tail(log([0.7, 0.299999, 1e-6])[:, :2])[0, -1]
    assert tail.exp().item() == pytest.approx(1e-6, rel=1e-9)


def test_the_sampled_reverse_kl_is_the_reverse_kl_on_average():
    student, teacher = make_logits(2, 7)
    p, q = softmax(student.tolist()), softmax(teacher.tolist())
    sampled = sampled_reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1)).tolist()
    assert math.fsum(a * d for a, d in zip(p, sampled, strict=True)) == pytest.approx(kl(p, q), rel=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_on_policy_the_sampled_kl_as_an_advantage_has_the_gradient_of_the_reverse_kl(weight):
    """Distillation on one's own tokens (OPD): peers let a gradient through the score of the teacher or of the student (miles #1966)."""
    student, teacher = make_logits(2, 7)
    advantages = -weight * sampled_reverse_kl(student.log_softmax(-1), teacher.log_softmax(-1))
    exact = [weight * g for g in reverse_kl_gradient(softmax(student.tolist()), softmax(teacher.tolist()))]
    ppo = expected_gradient(student, lambda x: clipped(ratio_of(x - x.detach()), advantages, Clip(0.2, 0.2))[0])
    reinforce = expected_gradient(student, lambda x: policy_gradient(x, advantages))
    np.testing.assert_allclose(ppo, exact, atol=1e-12)
    np.testing.assert_allclose(reinforce, exact, atol=1e-12)


def test_the_sampled_kl_as_a_loss_teaches_nothing():
    student, teacher = make_logits(2, 7)
    log_q = teacher.log_softmax(-1)
    np.testing.assert_allclose(expected_gradient(student, lambda x: sampled_reverse_kl(x, log_q)), [0.0] * 7, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_a_token_that_the_student_cannot_draw_leaves_the_gradient_finite(kind):
    student = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    out = divergence(student.log_softmax(-1), log([0.5, 0.3, 0.2]), kind)
    (slope,) = torch.autograd.grad(out.sum(), student)
    assert torch.isfinite(out).all() and torch.isfinite(slope).all()


@pytest.mark.parametrize("gap", [14.0, 16.0, 20.0])
def test_the_forward_kl_pulls_a_sure_student_towards_a_tail_that_the_teacher_uses(gap):
    student = torch.tensor([[gap + 1, gap, gap - 1, 0, 0, 0, 0, 0]], requires_grad=True)
    teacher = log([0.3, 0.2, 0.1, 0.08, 0.08, 0.08, 0.08, 0.08]).float()
    logprobs = student.log_softmax(-1)
    known = torch.cat([logprobs[:, :3], logprobs[:, 3:].logsumexp(-1, keepdim=True)], -1)
    out = divergence(known, with_tail(teacher[:, :3]), "forward")
    (got,) = torch.autograd.grad(out.sum(), student)
    p = softmax(student[0].tolist())
    tail, teacher_tail = math.fsum(p[3:]), 0.4
    exact = [a - b for a, b in zip(p[:3], [0.3, 0.2, 0.1], strict=True)] + [a - teacher_tail * a / tail for a in p[3:]]
    np.testing.assert_allclose(got[0].tolist(), exact, atol=1e-3)
