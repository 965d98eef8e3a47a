"""Weights that correct for tokens drawn by another policy than the one that is trained: the engine's numerics, or older weights.

    d        log p (trainer, before the update) - log p (engine) of a token, held within +-20
    level    token: d of the token itself · sequence: the sum of its sequence's · geometric: their mean
    w        exp(d at the level)
    bound    truncate: w held within [low, high] · mask: 0 where w is outside

TIS is token and truncate with low = 0 (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), IcePop
token and mask (Ring, 2025, arXiv 2510.18855). Times PPO's clipped loss it is decoupled PPO (arXiv 2110.00641).
"""

import torch
from torch import Tensor

from slime.algorithms.base import Sequences
from slime.algorithms.policy_loss import MAX_LOG_RATIO, ratio_of

LEVELS = ("token", "sequence", "geometric")
BOUNDS = ("truncate", "mask")


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequences: Sequences, level: str, bound: str, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """(weights, bounded), fp32 [t] each, without gradient; `bounded` is 1 where w lay outside [low, high]."""
    assert level in LEVELS and bound in BOUNDS, (level, bound)
    with torch.no_grad():
        d = (old_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if level == "sequence":
            d = sequences.sum(d)
        elif level == "geometric":
            d = sequences.mean(d)
        w = ratio_of(d)
        outside = (w < low) | (w > high)
        kept = torch.where(outside, 0.0, w) if bound == "mask" else w.clamp(low, high)
        return kept, outside.to(w.dtype)
