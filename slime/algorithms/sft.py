"""Supervised fine-tuning: the negative log-probability of demonstrated answers."""

import numpy as np

from slime.algorithms.base import Algorithm, LossInputs, LossOutputs, Step, Targets
from slime.config.algorithm import AlgorithmConfig


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(targets=targets, loss=loss, needs_rollouts=False, uses_old_logprobs=False)


def targets(step: Step) -> Targets:
    """Advantages of 0: a demonstration is not compared with anything."""
    return Targets(np.zeros(len(step.batch.tokens)))


def loss(inputs: LossInputs) -> LossOutputs:
    """-log p of every trainable token, [t], in nats."""
    nll = -inputs.logprobs
    return LossOutputs(nll, {"nll": nll.detach(), "entropy": inputs.entropy.detach()})
