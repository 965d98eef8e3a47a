"""GRPO: advantages relative to the other answers to the same prompt, and PPO's clipped loss (arXiv 2402.03300).

With normalize_std=false and aggregation=constant it is Dr.GRPO (arXiv 2503.20783); with clip_high above clip_low it has DAPO's
clip-higher (arXiv 2503.14476).
"""

from functools import partial

import numpy as np

from slime.algorithms.base import Algorithm, LossInputs, LossOutputs
from slime.algorithms.policy_loss import clipped_policy_loss, k3
from slime.config.algorithm import AlgorithmConfig
from slime.types import Batch

STD_EPS = 1e-6


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(advantages=partial(advantages, normalize_std=cfg.normalize_std), loss=partial(loss, cfg=cfg))


def advantages(batch: Batch, normalize_std: bool) -> np.ndarray:
    """(reward - group mean) / (group std + 1e-6), float64 [N]; std is unbiased, and not divided by in a group of one.

    Groups are told apart by `batch.group`, never by position, and may differ in size. A group of equal rewards gets exactly 0.
    """
    assert np.isfinite(batch.rewards).all(), "every sample of a batch has a finite reward"
    _, of, size_G = np.unique(batch.group, return_inverse=True, return_counts=True)
    lowest_G = np.full(len(size_G), np.inf)
    np.minimum.at(lowest_G, of, batch.rewards)
    above = batch.rewards - lowest_G[of]  # exactly 0 in a group of equal rewards, which a rounded mean is not
    centred = above - (np.bincount(of, above) / size_G)[of]
    if not normalize_std:
        return centred
    std_G = np.sqrt(np.bincount(of, centred**2) / np.maximum(size_G - 1, 1))
    std_G[np.isinf(std_G)] = np.nan  # squares that no double holds must not make an advantage of 0
    return centred / np.where(size_G > 1, std_G + STD_EPS, 1.0)[of]


def loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """Clipped surrogate minus entropy_coef * entropy, [t]."""
    clip_high = cfg.clip_low if cfg.clip_high is None else cfg.clip_high
    pg_loss, clipped = clipped_policy_loss(inputs.logprobs, inputs.old_logprobs, inputs.advantages, cfg.clip_low, clip_high)
    total = pg_loss - cfg.entropy_coef * inputs.entropy if cfg.entropy_coef else pg_loss
    metrics = {
        "pg_loss": pg_loss.detach(),
        "entropy": inputs.entropy.detach(),
        "clip_frac": clipped,
        "kl": k3(inputs.logprobs.detach(), inputs.old_logprobs),
    }
    return LossOutputs(total, metrics)
