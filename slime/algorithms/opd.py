"""On-policy distillation alone: the student learns from its own answers what teachers think of them; rewards play no part.

distill=sampled is the reverse KL by policy gradient (Thinking Machines, "On-Policy Distillation", 2025), topk and full differentiate a
divergence at the student's tokens (GKD, arXiv 2306.13649). Other algorithms take the same terms beside their rewards.
"""

from functools import partial

import torch

from slime.algorithms import grpo
from slime.algorithms.base import Algorithm, LossInputs, LossOutputs, Step, Targets
from slime.algorithms.terms import asked_for, from_teacher, with_common_terms
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    loss = grpo.loss if cfg.distill == "sampled" else divergence_alone
    return Algorithm(partial(targets, cfg=cfg), partial(loss, cfg=cfg), **asked_for(cfg))


def targets(step: Step, cfg: AlgorithmConfig) -> Targets:
    """distill_coef * (log teacher - log student) of the token drawn; 0 where the divergence itself is the loss."""
    return Targets(from_teacher(step, cfg))


def divergence_alone(inputs: LossInputs, cfg: AlgorithmConfig) -> LossOutputs:
    """The common terms without a policy gradient, [t]."""
    return with_common_terms(inputs, cfg, LossOutputs(torch.zeros_like(inputs.logprobs)))
