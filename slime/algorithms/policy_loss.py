"""The clipped surrogate that policy-gradient losses share."""

import torch
from torch import Tensor

# No real update changes a token's probability by e^20 = 5e8. Beyond that a ratio is held and passes no gradient: one such token would
# drown all others in fp32 sums, and from e^88 on exp() is inf, with NaN in the backward pass.
MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's loss a token, max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprobs - old_logprobs).

    All fp32 [t]. Returns (loss [t], clipped [t]); `clipped` is 1 where the clipped branch is the larger one and so stops the
    gradient, else 0, without gradient. The log-ratio is held within +-20. Sources: arXiv 1707.06347; separate bounds arXiv 2503.14476.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(plain, clipped), (clipped > plain).to(plain.dtype)


def k3(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(old || current) a token, fp32 [t], >= 0, for tokens drawn from old.

    exp(d) - 1 - d with d = logprobs - old_logprobs held within +-20. Source: joschu.net/blog/kl-approx.html.
    """
    d = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d
