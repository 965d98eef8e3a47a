"""What a batch says about the trainer and its engines. Pure numpy over whole batches."""

import numpy as np

from slime.types import Batch


def mismatch(logprobs: np.ndarray, batch: Batch) -> dict[str, float]:
    """How far the trainer's log-probs (float32 [T], before any update of the batch) are from the engines', over trained tokens.

    mismatch/logprob_abs_diff and _max: mean and largest |trainer - engine|. mismatch/kl: the k3 estimate of KL(engine || trainer) from
    tokens that the engine drew, exp(d) - 1 - d with d = trainer - engine (joschu.net/blog/kl-approx.html).
    """
    mask = batch.loss_mask
    if not mask.any():
        return {}
    d = logprobs[mask].astype(np.float64) - batch.rollout_logprobs[mask].astype(np.float64)
    return {
        "mismatch/logprob_abs_diff": float(np.abs(d).mean()),
        "mismatch/logprob_abs_diff_max": float(np.abs(d).max()),
        "mismatch/kl": float(np.mean(np.expm1(d) - d)),
    }


def advantage_stats(advantages: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over samples (float64 [N])."""
    return {"advantage/mean": float(advantages.mean()), "advantage/std": float(advantages.std())}


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a batch from those of its optimizer steps: means, the last learning rate, the number of micro-batches in all."""
    merged = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    merged["train/lr"] = updates[-1]["train/lr"]
    merged["train/micro_batches"] = float(sum(u["train/micro_batches"] for u in updates))
    merged["train/tokens"] = float(sum(u["train/tokens"] for u in updates))
    return merged
