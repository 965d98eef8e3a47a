"""RLOO: each answer's baseline is the mean of the other answers to its prompt, and PPO's clipped loss (arXiv 2402.14740)."""

from functools import partial

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, Step, Targets
from slime.algorithms.group_relative import leave_one_out
from slime.algorithms.terms import asked_for, from_teacher, per_token
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(targets, cfg=cfg), partial(grpo.loss, cfg=cfg), **asked_for(cfg))


def targets(step: Step, cfg: AlgorithmConfig) -> Targets:
    """reward - mean of the group's other rewards on every trainable token."""
    return Targets(per_token(step.batch, leave_one_out(step.batch.rewards, step.batch.group)) + from_teacher(step, cfg))
