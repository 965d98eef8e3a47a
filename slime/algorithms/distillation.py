"""Divergences between student and teacher at the student's own tokens. All fp32; the teacher carries no gradient.

    reverse   KL(student || teacher)                                 seeks a mode; MiniLLM, arXiv 2306.08543
    forward   KL(teacher || student)                                 covers all
    jsd       b KL(teacher || m) + (1 - b) KL(student || m), m = b teacher + (1 - b) student; GKD, arXiv 2306.13649

Of distributions that are known at k tokens only, what is left of either is one further outcome, the tail: nothing is renormalised, so
that a student with all its mass elsewhere is told so.
"""

import math

import torch
from torch import Tensor

DIVERGENCES = ("reverse", "forward", "jsd")
LEAST_LOGPROB = -1e4  # exp() of it is 0 in every float type, and it passes gradients without NaN
LEAST_TAIL = 1e-7  # of a probability: what fp32 knows of 1 - (a sum near 1)


def kind_of(beta: float) -> str:
    """The divergence that algorithm.distill_beta names: GKD's family from the forward KL at 0 to the reverse one at 1."""
    return "reverse" if beta == 1 else "forward" if beta == 0 else "jsd"


def sampled_reverse_kl(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """log student - log teacher of the token that the student drew, [t]: an estimate of the reverse KL at this position without bias.
    Subtracted from the advantage, its gradient is the reverse KL's (Thinking Machines, "On-Policy Distillation", 2025)."""
    return logprobs - teacher_logprobs


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Of log-probabilities [t, v] that sum to 1 over v, [t]. `beta` in (0, 1) is jsd's."""
    if kind == "reverse":
        return _kl(student, teacher)
    if kind == "forward":
        return _kl(teacher, student)
    assert kind == "jsd", kind
    middle = torch.logaddexp(teacher + math.log(beta), (student + math.log1p(-beta)).clamp(min=LEAST_LOGPROB))
    return beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)


def with_tail(logprobs_tk: Tensor) -> Tensor:
    """[t, k + 1]: the log-probabilities of k distinct tokens and of all others together, as far as fp32 knows them. For a teacher of whom
    no more is known; a student's tail comes from its logits, or its gradient would be lost where it is small."""
    inside = torch.logsumexp(logprobs_tk, -1, keepdim=True)
    tail = -torch.expm1(inside.clamp(max=0.0))
    return torch.cat([logprobs_tk, tail.clamp(min=LEAST_TAIL).log()], -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q), where p = 0 adds nothing."""
    weight = p.exp()
    return (weight * torch.where(weight > 0, p - q, 0.0)).sum(-1)
