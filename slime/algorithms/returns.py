"""From rewards of tokens to returns and advantages of tokens: float64 [T] in and out, sequences one after another.

Only trainable tokens take part. Prompts, tool results and what else `mask` (bool [T]) leaves out are not steps of an episode: the token
before such a stretch is followed by the one after it, and a token outside the mask has 0.
"""

import numpy as np


def terminal(rewards: np.ndarray, mask: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """A sequence's reward (float64 [N]) on its last trainable token, 0 elsewhere; a sequence without one keeps nothing of it."""
    assert len(rewards) == len(cu_seqlens) - 1, "one reward a sequence"
    steps = _Steps(mask, cu_seqlens)
    rewards_NR = np.zeros(steps.shape)
    rewards_NR[np.arange(len(rewards)), steps.count - 1] = rewards
    return steps.spread(rewards_NR)


def discounted(rewards_T: np.ndarray, mask: np.ndarray, cu_seqlens: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_{t+1} (REINFORCE++, arXiv 2501.03262)."""
    steps = _Steps(mask, cu_seqlens)
    return steps.spread(_accumulate(steps.gather(rewards_T), gamma))


def gae(
    rewards_T: np.ndarray, values_T: np.ndarray, mask: np.ndarray, cu_seqlens: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns): d_t = r_t + gamma V_{t+1} - V_t, A_t = d_t + gamma lam A_{t+1}, R_t = A_t + V_t (arXiv 1506.02438).

    values_T is the critic's estimate of what is to come when token t is about to be drawn, and 0 behind a sequence's last trainable one.
    """
    steps = _Steps(mask, cu_seqlens)
    values_NR = steps.gather(values_T)
    following_NR = np.concatenate([values_NR[:, 1:], np.zeros((len(values_NR), 1))], 1)
    advantages_NR = _accumulate(steps.gather(rewards_T) + gamma * following_NR - values_NR, gamma * lam)
    return steps.spread(advantages_NR), steps.spread(advantages_NR + values_NR)


def _accumulate(x_NR: np.ndarray, factor: float) -> np.ndarray:
    """y_t = x_t + factor y_{t+1}."""
    y_NR, following = np.empty_like(x_NR), np.zeros(len(x_NR))
    for t in range(x_NR.shape[1] - 1, -1, -1):
        y_NR[:, t] = following = x_NR[:, t] + factor * following
    return y_NR


class _Steps:
    """The trainable tokens of N sequences as a matrix: row n begins with those of sequence n, and 0 follows."""

    def __init__(self, mask: np.ndarray, cu_seqlens: np.ndarray) -> None:
        self.at = np.flatnonzero(mask)
        self.tokens = len(mask)
        self.row = np.searchsorted(cu_seqlens, self.at, "right") - 1
        self.count = np.bincount(self.row, minlength=len(cu_seqlens) - 1)
        self.column = np.arange(len(self.at)) - (np.cumsum(self.count) - self.count)[self.row]
        self.shape = (len(self.count), max(1, int(self.count.max(initial=0))))

    def gather(self, values_T: np.ndarray) -> np.ndarray:
        values_NR = np.zeros(self.shape)
        values_NR[self.row, self.column] = values_T[self.at]
        return values_NR

    def spread(self, values_NR: np.ndarray) -> np.ndarray:
        values_T = np.zeros(self.tokens)
        values_T[self.at] = values_NR[self.row, self.column]
        return values_T
