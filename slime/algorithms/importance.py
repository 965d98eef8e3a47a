"""Weights that correct for tokens drawn by another policy than the one that is trained: the engine's numerics, or older weights.

    d        log p (trainer, before the update) - log p (engine) of a token, held within +-20
    level    token: d of the token itself · sequence: the sum of its sequence's · geometric: their mean · lowest: their least
    ratio    exp(d at the level)
    w        the ratio at the level `importance`, held within [importance_low, importance_high]; 1 with importance=none
    reject   w is 0 where a ratio lies outside the bounds that `importance_reject` has for its level

TIS is w of a token with low = 0 (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"); IcePop also
rejects by that ratio (Ring, 2025, arXiv 2510.18855). Weights and rejection of separate levels, with a veto by the lowest ratio, are MIS
(Liu et al. 2025, "When Speed Kills Stability"). Times PPO's clipped loss w is decoupled PPO (arXiv 2110.00641).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.algorithms.base import Sequences, Step
from slime.algorithms.policy_loss import ratio_of
from slime.algorithms.sequences import SequencesHere
from slime.config.algorithm import AlgorithmConfig
from slime.config.algorithms import MAX_LOG_RATIO

LEVELS: dict[str, Callable[[Tensor, Sequences], Tensor]] = {
    "token": lambda d, sequences: d,
    "sequence": lambda d, sequences: sequences.sum(d),
    "geometric": lambda d, sequences: sequences.mean(d),
    "lowest": lambda d, sequences: sequences.min(d),
}


@dataclass(frozen=True)
class Importance:
    """[t] each, without gradient."""

    weights: Tensor
    bounded: Tensor  # 1 where the ratio lay outside [importance_low, importance_high]
    rejected: Tensor  # 1 where a level rejects


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, sequences: Sequences, cfg: AlgorithmConfig) -> Importance:
    """The weights of these tokens before `importance_scale`. What is no number is rejected."""
    with torch.no_grad():
        d = (old_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weights, bounded, rejected = torch.ones_like(d), torch.zeros_like(d), torch.zeros_like(d)
        if cfg.importance != "none":
            low, high = cfg.importance_low, cfg.importance_high
            ratio = ratio_of(LEVELS[cfg.importance](d, sequences))
            weights, bounded = ratio.clamp(low, high), _outside(ratio, low, high)
        for level, (low, high) in cfg.importance_reject.items():
            rejected = rejected.maximum(_outside(ratio_of(LEVELS[level](d, sequences)), low, high))
        return Importance(torch.where(rejected > 0, 0.0, weights), bounded, rejected)


def importance_scale(step: Step, cfg: AlgorithmConfig) -> float:
    """What makes the mean of a batch's weights 1, over all its trained tokens: 1 / their mean, or 1 where all are 0.

    The mean is taken after bounds and rejection, of all tokens whatever the level. What is rejected counts in it, as 0: those that are kept
    make up for it in a loss that is divided by all. MIS takes it of a micro-batch, after the bounds and before rejection.
    """
    assert step.old_logprobs is not None, "asked for"
    mask = step.batch.loss_mask
    old, rollout = (torch.from_numpy(x[mask]).double() for x in (step.old_logprobs, step.batch.rollout_logprobs))
    sequences = SequencesHere(torch.from_numpy(step.batch.sample_of_token[mask]), len(step.batch))
    weights = importance_weights(old, rollout, sequences, cfg).weights
    total = float(weights.sum())
    return len(weights) / total if total else 1.0


def _outside(ratio: Tensor, low: float, high: float) -> Tensor:
    """1 where a ratio does not lie within the bounds."""
    return (~((ratio >= low) & (ratio <= high))).to(ratio.dtype)
