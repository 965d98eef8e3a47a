"""PPO with a critic: generalised advantage estimation over the trainable tokens, and the clipped loss (arXiv 1707.06347, 1506.02438)."""

from functools import partial

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, Step, Targets
from slime.algorithms.returns import gae, terminal
from slime.algorithms.terms import asked_for, from_teacher, kl_in_reward
from slime.algorithms.whitening import whiten
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(targets, cfg=cfg), partial(grpo.loss, cfg=cfg), uses_critic=True, **asked_for(cfg))


def targets(step: Step, cfg: AlgorithmConfig) -> Targets:
    """GAE of -kl a token and the sample's reward on its last trainable one; the critic learns the returns, which are not whitened."""
    mask, cu_seqlens = step.batch.loss_mask, step.batch.cu_seqlens
    assert step.values is not None, "asked for"
    kl_T, metrics = kl_in_reward(step, cfg)
    rewards_T = terminal(step.batch.rewards, mask, cu_seqlens) - kl_T
    advantages_T, returns_T = gae(rewards_T, step.values.astype(float), mask, cu_seqlens, cfg.gamma, cfg.lam)
    advantages_T += from_teacher(step, cfg)
    return Targets(whiten(advantages_T, mask) if cfg.normalize else advantages_T, returns_T, metrics)
