"""What an algorithm is: a pair of pure functions and what they need."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from slime.types import Batch


@dataclass(slots=True)
class LossInputs:
    """Local packed tokens of one micro-batch, trainable ones only. t tokens; all fp32 [t] unless said otherwise."""

    logprobs: Tensor  # log-probability of each token under the weights being trained, at the rollout temperature (1 without rollouts);
    #                   carries the gradient
    old_logprobs: Tensor  # the same before the batch's first optimizer step, see `Algorithm.uses_old_logprobs`; no gradient
    entropy: Tensor  # nats, of the distribution that the token was drawn from; carries the gradient
    advantages: Tensor  # the sample's advantage, repeated on its tokens; no gradient
    rollout_logprobs: Tensor  # as the engine reported them when it drew the token; no gradient
    sample: Tensor  # int64 [t], which local sequence a token belongs to


@dataclass(slots=True)
class LossOutputs:
    """Unreduced: the trainer sums both over the update's tokens with the weights of `token_weights`."""

    loss: Tensor  # fp32 [t], to be minimised
    metrics: dict[str, Tensor] = field(default_factory=dict)  # fp32 [t] each, detached; `pg_loss` is reported as train/pg_loss


@dataclass(frozen=True)
class Algorithm:
    """A way to learn from a batch.

    `advantages` sees a step's whole batch before it is sharded: rewards -> float64 [N]. `loss` sees packed local tokens and
    reduces nothing, so that no result depends on micro-batches, packing order or layout.
    """

    advantages: Callable[[Batch], np.ndarray]
    loss: Callable[[LossInputs], LossOutputs]
    needs_rollouts: bool = True  # False: learns from demonstrations, no engine is started
    uses_old_logprobs: bool = True  # the loss reads old_logprobs. With several optimizer steps a batch they take a forward pass over it
    #                                 of their own. With one step, or if False, they are the current ones, detached
