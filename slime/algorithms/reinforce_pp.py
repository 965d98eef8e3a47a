"""REINFORCE++ and its form with a baseline: returns of tokens, whitened over the whole batch, and PPO's clipped loss (arXiv 2501.03262)."""

from functools import partial

import numpy as np

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, Step, Targets
from slime.algorithms.group_relative import centred
from slime.algorithms.returns import discounted, terminal
from slime.algorithms.terms import asked_for, from_teacher, kl_in_reward, per_token
from slime.algorithms.whitening import whiten
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(targets, cfg=cfg), partial(grpo.loss, cfg=cfg), **asked_for(cfg))


def build_with_baseline(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(targets_with_baseline, cfg=cfg), partial(grpo.loss, cfg=cfg), **asked_for(cfg))


def targets(step: Step, cfg: AlgorithmConfig) -> Targets:
    """The discounted sum of a token's rewards to come: -kl of each, and the sample's reward on the last."""
    mask, cu_seqlens = step.batch.loss_mask, step.batch.cu_seqlens
    kl_T, metrics = kl_in_reward(step, cfg)
    rewards_T = terminal(step.batch.rewards, mask, cu_seqlens) - kl_T
    return _whitened(discounted(rewards_T, mask, cu_seqlens, cfg.gamma), metrics, step, cfg)


def targets_with_baseline(step: Step, cfg: AlgorithmConfig) -> Targets:
    """reward - group mean - kl of the token."""
    kl_T, metrics = kl_in_reward(step, cfg)
    return _whitened(per_token(step.batch, centred(step.batch.rewards, step.batch.group)) - kl_T, metrics, step, cfg)


def _whitened(advantages_T: np.ndarray, metrics: dict[str, float], step: Step, cfg: AlgorithmConfig) -> Targets:
    advantages_T = advantages_T + from_teacher(step, cfg)
    return Targets(whiten(advantages_T, step.batch.loss_mask) if cfg.normalize else advantages_T, metrics=metrics)
