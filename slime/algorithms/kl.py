"""Estimates of KL(policy || reference) from the tokens that the policy drew (joschu.net/blog/kl-approx.html).

With d = log policy - log reference of a token, held within +-20:

    k1   d                   no bias, may be negative. As a loss it teaches nothing: its gradient has the expectation 0
    k2   d^2 / 2             biased in value; as a loss its gradient is that of the reverse KL
    k3   exp(-d) - 1 + d     no bias, >= 0; as a loss its gradient is that of the forward KL
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slime.config.algorithms import MAX_LOG_RATIO


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d, [t]; the gradient is logprobs' own."""
    return _d(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2, [t]."""
    return _d(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d, [t], without the loss of digits near 0."""
    d = _d(logprobs, ref_logprobs)
    return torch.expm1(-d) + d


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def unbiased(kl: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """ratio * kl with ratio = policy / the policy that drew the token, both with their gradients: of k1 or k3 the estimate for the policy
    of now without bias, and the gradient of its reverse KL (DeepSeek-V3.2, arXiv 2512.02556); of k2 neither."""
    return torch.exp(_d(logprobs, old_logprobs)) * kl


def _d(logprobs: Tensor, other: Tensor) -> Tensor:
    return (logprobs - other).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
