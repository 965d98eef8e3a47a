"""Losses of a token that policy-gradient algorithms share. All tensors fp32 [t]; advantages carry no gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slime.config.algorithms import MAX_LOG_RATIO


@dataclass(frozen=True)
class Clip:
    """How far a ratio counts: [1 - low, 1 + high], and with `dual` at most `dual` where the advantage is negative."""

    low: float
    high: float
    dual: float | None = None  # above 1


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), the log-ratio held within +-20."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's loss, max(-r A, -clip(r, 1 - low, 1 + high) A) (arXiv 1707.06347; separate bounds arXiv 2503.14476); with dual clip
    min(that, -dual A) where A < 0 (arXiv 1912.09729).

    Returns (loss, held); `held` is 1 where one of these bounds stops the gradient, else 0, without gradient.
    """
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    loss, held = torch.maximum(plain, bounded), bounded > plain
    if clip.dual is not None:
        ceiling = -clip.dual * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss, held = torch.where(over, ceiling, loss), held | over
    return loss, held.to(plain.dtype)


def cispo(logprobs: Tensor, ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """-sg(clip(r, 1 - low, 1 + high)) A log p (CISPO, arXiv 2506.13585): a ratio that is held still passes a gradient. Returns (loss, held)
    as `clipped` does."""
    ratio = ratio.detach()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    return -bounded * advantages * logprobs, (bounded != ratio).to(ratio.dtype)


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log p (REINFORCE, Williams 1992)."""
    return -advantages * logprobs
