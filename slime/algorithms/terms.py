"""The parts that losses and targets of several algorithms have in common."""

from functools import partial
from typing import Any

import numpy as np
import torch

from slime.algorithms import kl
from slime.algorithms.base import LossInputs, LossOutputs, Step
from slime.algorithms.importance import importance_scale, importance_weights
from slime.algorithms.opsm import dropped_tokens
from slime.algorithms.policy_loss import Clip
from slime.config.algorithm import AlgorithmConfig
from slime.types import Batch


def clip_of(cfg: AlgorithmConfig, low: float = 0.2, high: float | None = None) -> Clip:
    """The recipe's bounds; `low` and `high` are the algorithm's defaults; without one, `high` is what the lower bound is."""
    low = low if cfg.clip_low is None else cfg.clip_low
    high = low if high is None else high
    return Clip(low, high if cfg.clip_high is None else cfg.clip_high, cfg.clip_dual)


def per_token(batch: Batch, values_N: np.ndarray) -> np.ndarray:
    """Each sample's value on its trainable tokens, 0 elsewhere, [T]."""
    return np.where(batch.loss_mask, values_N[batch.sample_of_token], 0.0)


def kl_in_reward(step: Step, cfg: AlgorithmConfig) -> tuple[np.ndarray, dict[str, float]]:
    """(kl_reward_coef times the KL to the reference of every trainable token, [T], to be subtracted from its reward; its metric)."""
    if not cfg.kl_reward_coef:
        return np.zeros(len(step.batch.tokens)), {}
    assert step.old_logprobs is not None and step.ref_logprobs is not None, "asked for by the algorithm"
    policy, reference = (torch.from_numpy(x.astype(np.float64)) for x in (step.old_logprobs, step.ref_logprobs))
    estimate, mask = kl.ESTIMATORS[estimator(cfg)](policy, reference).numpy(), step.batch.loss_mask
    return np.where(mask, cfg.kl_reward_coef * estimate, 0.0), {"train/ref_kl": float(estimate[mask].mean())}


def estimator(cfg: AlgorithmConfig) -> str:
    """Which one of slime.algorithms.kl the recipe means: it has its KL in the reward or in the loss, not in both."""
    if cfg.kl_estimator == "auto":
        return "k1" if cfg.kl_reward_coef else "k2"
    return cfg.kl_estimator


def from_teacher(step: Step, cfg: AlgorithmConfig) -> np.ndarray:
    """distill=sampled: distill_coef * (log teacher - log student) of every trainable token, [T]; to be added to its advantage. Else 0."""
    if cfg.distill != "sampled":
        return np.zeros(len(step.batch.tokens))
    assert step.old_logprobs is not None and step.teacher_logprobs is not None, "asked for by the algorithm"
    behind = step.teacher_logprobs.astype(np.float64) - step.old_logprobs.astype(np.float64)
    return np.where(step.batch.loss_mask, cfg.distill_coef * behind, 0.0)


def with_common_terms(inputs: LossInputs, cfg: AlgorithmConfig, outputs: LossOutputs) -> LossOutputs:
    """The policy loss of an algorithm, weighed by the importance of its tokens and without those that opsm drops, with entropy, KL and
    distillation as the recipe says."""
    loss, metrics = outputs.loss, {"pg_loss": outputs.loss.detach(), "entropy": inputs.entropy.detach(), **outputs.metrics}
    metrics["kl"] = kl.k3(inputs.old_logprobs, inputs.logprobs.detach())  # of the policy before the batch to the current one
    if cfg.importance != "none" or cfg.importance_reject:
        found = importance_weights(inputs.old_logprobs, inputs.rollout_logprobs, inputs.sequences, cfg)
        loss = inputs.importance_scale * found.weights * loss
        metrics["importance"] = found.weights
        if cfg.importance != "none":
            metrics["importance_bounded_frac"] = found.bounded
        if cfg.importance_reject:
            metrics["importance_rejected_frac"] = found.rejected
    if cfg.opsm_delta is not None:
        known = inputs.logprobs, inputs.rollout_logprobs, inputs.advantages, inputs.sequences
        dropped = dropped_tokens(*known, cfg.opsm_delta)
        loss, metrics = torch.where(dropped, 0.0, loss), {**metrics, "opsm_frac": dropped.to(loss.dtype)}
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * inputs.entropy
    if cfg.kl_loss_coef:
        assert inputs.ref_logprobs is not None, "asked for by the algorithm"
        if estimator(cfg) == "unbiased":
            estimate = kl.unbiased(kl.k3(inputs.logprobs, inputs.ref_logprobs), inputs.logprobs, inputs.old_logprobs)
        else:
            estimate = kl.ESTIMATORS[estimator(cfg)](inputs.logprobs, inputs.ref_logprobs)
        loss, metrics = loss + cfg.kl_loss_coef * estimate, {**metrics, "ref_kl": estimate.detach()}
    if cfg.distill in ("topk", "full"):
        assert inputs.distillation is not None, "asked for by the algorithm"
        loss, metrics = loss + cfg.distill_coef * inputs.distillation, {**metrics, "distillation": inputs.distillation.detach()}
    return LossOutputs(loss, metrics)


def asked_for(cfg: AlgorithmConfig) -> dict[str, Any]:
    """What the common terms need, as keywords of `Algorithm`."""
    return {
        "needs_old_logprobs": cfg.kl_reward_coef > 0 or cfg.distill == "sampled" or cfg.importance_normalize,
        "uses_reference": cfg.kl_reward_coef > 0 or cfg.kl_loss_coef > 0,
        "importance_scale": partial(importance_scale, cfg=cfg) if cfg.importance_normalize else None,
    }
