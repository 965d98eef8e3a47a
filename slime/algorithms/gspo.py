"""GSPO: GRPO's advantages, with the ratio of a whole sequence in place of each token's (arXiv 2507.18071)."""

from functools import partial

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, LossInputs, LossOutputs
from slime.algorithms.policy_loss import clipped, ratio_of
from slime.algorithms.terms import asked_for, clip_of, with_common_terms
from slime.config.algorithm import AlgorithmConfig

CLIP_LOW, CLIP_HIGH = 3e-4, 4e-4  # of the paper: a mean over a sequence moves far less than a token


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(grpo.targets, cfg=cfg), partial(loss, cfg=cfg), **asked_for(cfg))


def loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """The clipped surrogate with r = exp(mean over the sequence of log p - log p_old), [t]: a token's gradient carries 1 / its length."""
    ratio = ratio_of(inputs.sequences.mean(inputs.logprobs - inputs.old_logprobs))
    surrogate, held = clipped(ratio, inputs.advantages, clip_of(cfg, CLIP_LOW, CLIP_HIGH))
    return with_common_terms(inputs, cfg, LossOutputs(surrogate, {"clip_frac": held}))
