"""What a batch says about the trainer and its engines. Pure numpy over whole batches."""

import numpy as np

from slime.algorithms.base import Step
from slime.observe.mismatch import k3
from slime.observe.mismatch import mismatch as of_differences
from slime.types import NO_VERSION, Batch


def mismatch(logprobs: np.ndarray, batch: Batch, version: int) -> dict[str, float]:
    """See `slime.observe.mismatch`. logprobs float32 [T], under the weights `version` that the trainer holds; read are the trained tokens
    of samples that were drawn from `version` alone."""
    return of_differences(_log_ratio(logprobs, batch, batch.version == version))


def off_policy(logprobs: np.ndarray, batch: Batch) -> dict[str, float]:
    """How far the policy has moved from the ones that drew the batch: what importance weights have to correct.

    logprobs float32 [T], as for `mismatch`; read are the trained tokens of all samples that a policy drew, whichever version. With
    d = log pi_train - log pi_rollout a token and w = exp(d): offpolicy/kl is the k3 estimate of KL(rollout || train), the mean of
    w - 1 - d; offpolicy/ess the normalised effective sample size of the n token weights, (sum w)^2 / (n sum w^2), from 1 / n to 1 (Kong
    1992); offpolicy/ratio_mean and /ratio_max those of w itself, before any bound: the mean is 1 in expectation, whatever the policies.
    Absent where there is no such token. What is not finite stays so, and w is inf where no double holds it.
    """
    d = _log_ratio(logprobs, batch, batch.version != NO_VERSION)
    if not len(d):
        return {}
    w, scaled = np.exp(d), np.exp(d - d.max())  # a common factor cancels in the sample size
    return {
        "offpolicy/kl": k3(d),
        "offpolicy/ess": float(scaled.sum() ** 2 / (len(w) * (scaled**2).sum())),
        "offpolicy/ratio_mean": float(w.mean()),
        "offpolicy/ratio_max": float(w.max()),
    }


def staleness(batch: Batch, version: int) -> dict[str, float]:
    """staleness/mean and /max over samples: versions between the oldest weights that drew a token and the trainer's `version`. Absent
    where no policy drew any."""
    behind = version - batch.version[batch.version != NO_VERSION]
    return {"staleness/mean": float(behind.mean()), "staleness/max": float(behind.max())} if len(behind) else {}


def _log_ratio(logprobs: np.ndarray, batch: Batch, chosen: np.ndarray) -> np.ndarray:
    """float64, trainer's minus engine's log-prob of each trained token of the chosen samples (bool [N])."""
    at = batch.loss_mask & chosen[batch.sample_of_token]
    return logprobs[at].astype(np.float64) - batch.rollout_logprobs[at].astype(np.float64)


def teachers(known: Step, names: list[str]) -> dict[str, float]:
    """distill/reverse_kl, and of each teacher distill/<name>/reverse_kl: the mean of log student - log teacher over the trained tokens, an
    estimate of KL(student || teacher). Absent where no teacher speaks of the tokens drawn."""
    if known.teacher_logprobs is None or known.old_logprobs is None or known.batch.teacher is None:
        return {}
    mask, ahead = known.batch.loss_mask, known.old_logprobs.astype(np.float64) - known.teacher_logprobs
    found = {"distill/reverse_kl": float(ahead[mask].mean())}
    for number, name in enumerate(names if len(names) > 1 else []):
        if (own := mask & (known.batch.teacher == number)[known.batch.sample_of_token]).any():
            found[f"distill/{name}/reverse_kl"] = float(ahead[own].mean())
    return found


def advantage_stats(advantages: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over the trained tokens (float64 [t])."""
    return {"advantage/mean": float(advantages.mean()), "advantage/std": float(advantages.std())}


def of_values(values: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """value/mean, and value/explained_variance = 1 - Var(R - V) / Var(R): 1 where the values are the returns but for a constant, 0 where
    they say nothing of them. Of the trained tokens of a batch, values float32 and returns float64 [t], before it is learned from. The
    second is absent where all returns are equal."""
    found = {"value/mean": float(values.mean(dtype=np.float64))} if len(values) else {}
    if len(returns) and (variance := float(returns.var())):
        found["value/explained_variance"] = 1 - float((returns - values).var()) / variance
    return found


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a batch from those of its optimizer steps: means, the last learning rate, the number of micro-batches in all."""
    merged = {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    merged["train/lr"] = updates[-1]["train/lr"]
    merged["train/micro_batches"] = float(sum(u["train/micro_batches"] for u in updates))
    merged["train/tokens"] = float(sum(u["train/tokens"] for u in updates))
    return merged
