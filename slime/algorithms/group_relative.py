"""Rewards compared with those of the other answers to the same prompt. float64 [N] in, float64 [N] out.

Groups are told apart by `group` (int64 [N]), never by position, and may differ in size. In a group of equal rewards every result is exactly
0, which a rounded mean would not give.
"""

import numpy as np

STD_EPS = 1e-6


def centred(rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """reward - group mean (Dr.GRPO, arXiv 2503.20783)."""
    above, of, size_G = _above(rewards, group)
    return above - (np.bincount(of, above) / size_G)[of]


def standardised(rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(reward - group mean) / (group std + 1e-6) with the unbiased std (GRPO, arXiv 2402.03300); a group of one is 0."""
    centred_N = centred(rewards, group)
    _, of, size_G = np.unique(group, return_inverse=True, return_counts=True)
    std_G = np.sqrt(np.bincount(of, centred_N**2) / np.maximum(size_G - 1, 1))
    std_G[np.isinf(std_G)] = np.nan  # squares that no double holds must not make an advantage of 0
    return centred_N / (std_G + STD_EPS)[of]


def leave_one_out(rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    """reward - mean of the group's other rewards (RLOO, arXiv 2402.14740); a group of one has nothing to compare with and is 0."""
    above, of, size_G = _above(rewards, group)
    others = (np.bincount(of, above)[of] - above) / np.maximum(size_G - 1, 1)[of]
    return np.where(size_G[of] > 1, above - others, 0.0)


def _above(rewards: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reward - lowest of its group [N], which group [N], sizes [G])."""
    assert np.isfinite(rewards).all(), "every sample of a batch has a finite reward"
    _, of, size_G = np.unique(group, return_inverse=True, return_counts=True)
    lowest_G = np.full(len(size_G), np.inf)
    np.minimum.at(lowest_G, of, rewards)
    return rewards - lowest_G[of], of, size_G
