"""GRPO: advantages relative to the other answers to the same prompt, and PPO's clipped loss (arXiv 2402.03300).

With normalize=false and aggregation=constant it is Dr.GRPO (arXiv 2503.20783); with clip_high above clip_low, aggregation=token and
rollout.filter that drops groups of equal rewards, DAPO (arXiv 2503.14476).
"""

from functools import partial

from slime.algorithms import group_relative
from slime.algorithms.base import Algorithm, LossInputs, LossOutputs, Step, Targets
from slime.algorithms.policy_loss import clipped, ratio_of
from slime.algorithms.terms import asked_for, clip_of, from_teacher, per_token, with_common_terms
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(targets, cfg=cfg), partial(loss, cfg=cfg), **asked_for(cfg))


def targets(step: Step, cfg: AlgorithmConfig) -> Targets:
    """(reward - group mean) / (group std + 1e-6) on every trainable token."""
    compare = group_relative.standardised if cfg.normalize else group_relative.centred
    return Targets(per_token(step.batch, compare(step.batch.rewards, step.batch.group)) + from_teacher(step, cfg))


def loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """Clipped surrogate, [t]."""
    ratio = ratio_of(inputs.logprobs - inputs.old_logprobs)
    surrogate, held = clipped(ratio, inputs.advantages, clip_of(cfg))
    return with_common_terms(inputs, cfg, LossOutputs(surrogate, {"clip_frac": held}))
