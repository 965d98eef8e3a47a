"""Supervised fine-tuning: the negative log-probability of demonstrated answers."""

import numpy as np

from slime.algorithms.base import Algorithm, LossInputs, LossOutputs
from slime.config.algorithm import AlgorithmConfig
from slime.types import Batch


def build(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(advantages=advantages, loss=loss, needs_rollouts=False, uses_old_logprobs=False)


def advantages(batch: Batch) -> np.ndarray:
    """Zeros, float64 [N]: a demonstration is not compared with anything."""
    return np.zeros(len(batch))


def loss(inputs: LossInputs) -> LossOutputs:
    """-log p of every trainable token, [t], in nats."""
    nll = -inputs.logprobs
    return LossOutputs(nll, {"nll": nll.detach(), "entropy": inputs.entropy.detach()})
