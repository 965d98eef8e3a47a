"""Advantages of mean 0 and standard deviation 1 over a whole batch."""

import numpy as np

VAR_EPS = 1e-8


def whiten(values_T: np.ndarray, mask: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8) over the masked tokens of the batch (bool [T]), 0 elsewhere; float64 [T].

    The variance is unbiased and taken in a second pass about the mean: the difference of two sums of squares would be negative for values
    that are close to each other and far from 0. Without `centre` the mean is subtracted for the variance alone. Of one token, or of equal
    ones, the result is 0 (without `centre`: it may be large, and says so by being so).
    """
    values_T = values_T.astype(np.float64)
    chosen = values_T[mask]
    if not len(chosen):
        return np.zeros(len(values_T))
    mean = chosen[0] + (chosen - chosen[0]).mean()  # exact for equal values
    variance = ((chosen - mean) ** 2).sum() / max(len(chosen) - 1, 1)
    variance = np.nan if np.isinf(variance) else variance  # squares that no double holds must not make an advantage of 0
    return np.where(mask, (values_T - (mean if centre else 0.0)) / np.sqrt(variance + VAR_EPS), 0.0)
