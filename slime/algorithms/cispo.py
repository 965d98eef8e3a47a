"""CISPO: GRPO's advantages and REINFORCE weighed by a bounded ratio, so that no token loses its gradient (MiniMax-M1, arXiv 2506.13585)."""

from functools import partial

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, LossInputs, LossOutputs
from slime.algorithms.policy_loss import cispo, ratio_of
from slime.algorithms.terms import asked_for, clip_of, with_common_terms
from slime.config.algorithm import AlgorithmConfig

CLIP_LOW, CLIP_HIGH = 1.0, 4.0  # no lower bound


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(partial(grpo.targets, cfg=cfg), partial(loss, cfg=cfg), **asked_for(cfg))


def loss(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """-sg(clip(r)) A log p, [t]."""
    ratio = ratio_of(inputs.logprobs - inputs.old_logprobs)
    weighed, held = cispo(inputs.logprobs, ratio, inputs.advantages, clip_of(cfg, CLIP_LOW, CLIP_HIGH))
    return with_common_terms(inputs, cfg, LossOutputs(weighed, {"clip_frac": held}))
