"""What an algorithm is: a pair of pure functions, and what they ask the trainer to compute for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from slime.types import Batch


class Sequences(Protocol):
    """Which of the local packed tokens [t] belong to one sequence, and the way to its other tokens, which may lie on other ranks. Results
    are the same on every token of a sequence; gradients flow through them to all of its tokens, wherever they lie."""

    def sum(self, x: Tensor) -> Tensor:
        """[t], the sum of x over the trainable tokens of each token's sequence."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """[t], their mean."""
        ...

    def min(self, x: Tensor) -> Tensor:
        """[t], the least of them, without gradient."""
        ...


@dataclass(slots=True)
class Step:
    """A step's whole batch before its first optimizer step, as every rank has it. float32 [T], 0 outside batch.loss_mask; None where the
    algorithm has not asked for it."""

    batch: Batch
    old_logprobs: np.ndarray | None = None  # of the policy, by the trainer
    ref_logprobs: np.ndarray | None = None  # of the reference policy
    teacher_logprobs: np.ndarray | None = None  # of the teacher that the sample's source names
    values: np.ndarray | None = None  # of the critic: what is to come when the token is about to be drawn


@dataclass(slots=True)
class Targets:
    """What the losses aim at; float64 [T], 0 outside loss_mask."""

    advantages: np.ndarray
    returns: np.ndarray | None = None  # what a critic learns; None without one
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class LossInputs:
    """Local packed tokens of one micro-batch, trainable ones only. t tokens; all fp32 [t] unless said otherwise."""

    logprobs: Tensor  # log-probability of each token under the weights being trained, at the rollout temperature (1 without rollouts);
    #                   carries the gradient
    old_logprobs: Tensor  # the same before the batch's first optimizer step, see `Algorithm.uses_old_logprobs`; no gradient
    entropy: Tensor  # nats, of the distribution that the token was drawn from; carries the gradient
    advantages: Tensor  # no gradient
    rollout_logprobs: Tensor  # as the engine reported them when it drew the token; no gradient
    sequences: Sequences
    ref_logprobs: Tensor | None = None  # of the reference policy; no gradient; asked for by `uses_reference`
    distillation: Tensor | None = (
        None  # divergence from the teacher at the token's position; carries the gradient; where the recipe's `distill` is topk or full
    )
    importance_scale: float = 1.0  # what importance weights are multiplied by, see `Algorithm.importance_scale`


@dataclass(slots=True)
class LossOutputs:
    """Unreduced: the trainer sums both over the update's tokens with the weights of `token_weights`."""

    loss: Tensor  # fp32 [t], to be minimised
    metrics: dict[str, Tensor] = field(default_factory=dict)  # fp32 [t] each, detached; `pg_loss` is reported as train/pg_loss


@dataclass(frozen=True)
class Algorithm:
    """A way to learn from a batch.

    `targets` sees a step's whole batch before it is sharded. `loss` sees packed local tokens and reduces nothing but by `Sequences`, so
    that no result depends on micro-batches, packing order or layout.
    """

    targets: Callable[[Step], Targets]
    loss: Callable[[LossInputs], LossOutputs]
    needs_rollouts: bool = True  # False: learns from demonstrations, no engine is started
    uses_old_logprobs: bool = True  # the loss reads old_logprobs. With several optimizer steps a batch they take a forward pass over it
    #                                 of their own. With one step, or if False, they are the current ones, detached
    needs_old_logprobs: bool = False  # `targets` reads them: a forward pass of their own even with one optimizer step a batch
    uses_reference: bool = False
    uses_critic: bool = False
    importance_scale: Callable[[Step], float] | None = None  # what the whole batch's importance weights are multiplied by; None: 1
