"""How far trainer and engines are apart for the same tokens under the same weights: a fault of one of them, no change of the policy."""

import numpy as np

PROBED = 4096  # tokens, about, of which both are asked where a batch comes from other weights


def mismatch(d: np.ndarray) -> dict[str, float]:
    """d float64, trainer's minus engine's log-prob of each token. mismatch/logprob_abs_diff and _max are the mean and largest |d|,
    mismatch/kl the k3 estimate of KL(engine || trainer), the mean of exp(d) - 1 - d (joschu.net/blog/kl-approx.html). Absent where there
    is no token. What is not finite stays so."""
    if not len(d):
        return {}
    return {
        "mismatch/logprob_abs_diff": float(np.abs(d).mean()),
        "mismatch/logprob_abs_diff_max": float(np.abs(d).max()),
        "mismatch/kl": k3(d),
    }


def k3(d: np.ndarray) -> float:
    """The mean of exp(d) - 1 - d."""
    return float(np.mean(np.expm1(d) - d))
