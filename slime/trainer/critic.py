"""The critic: a model of its own that estimates, of every token that is about to be drawn, the rewards to come (arXiv 1707.06347).

It reads a batch once before anybody learns from it (`values`) and learns the returns that the algorithm makes of that (`learn`), in as many
optimizer steps as the policy. A value is a number in units of reward: no temperature divides it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from slime.algorithms.aggregation import token_weights
from slime.algorithms.value_loss import clipped_value_loss
from slime.config import SlimeConfig
from slime.config.of_critic import of_critic
from slime.observe.trace import Tracer
from slime.trainer.device import Device
from slime.trainer.distributed import Parallel
from slime.trainer.metrics import of_values
from slime.trainer.model import build_value_model
from slime.trainer.optimize import accumulate, take_step, weighted_sums
from slime.trainer.packing import MicroBatch, updates_of
from slime.trainer.passes import gather, look, tokens_of
from slime.trainer.state import Trained
from slime.types import Batch


@dataclass(kw_only=True)
class Critic(Trained):
    """One rank's share of it. Its version counts the batches that it has learned from."""

    UPDATE: ClassVar[str] = "the critic's update"
    BESIDE: ClassVar[str] = " (the policy's on its batch were: only the last checkpoint is whole)"
    RATE: ClassVar[str] = "critic.lr"
    READS: ClassVar[str] = "values or returns"


def build_critic(cfg: SlimeConfig, device: Device, parallel: Parallel, tracer: Tracer) -> Critic:
    """From critic.path; all ranks call it together. Raises ValueError for a model or an option that cannot be used."""
    own = of_critic(cfg)
    return Critic(cfg=own, device=device, parallel=parallel, model=build_value_model(own, parallel), tracer=tracer)


def values(critic: Critic, batch: Batch) -> np.ndarray:
    """Of every trained token, at the position that predicts it, under the current weights: float32 [T], 0 outside loss_mask.

    Every rank computes its share and gets all of it.
    """

    def keep(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, tuple[np.ndarray, Tensor]]:
        found = _at_rows(micro_batch, output)
        return found.sum(), (micro_batch.trained, found)

    return gather(critic, look(critic, _own(batch), keep, span="values"), len(batch.tokens))


def learn(critic: Critic, batch: Batch, old: np.ndarray, returns: np.ndarray) -> dict[str, float]:
    """Take the batch's optimizer steps towards `returns` (float64 [T]); `old` (float32 [T]) are the values before the first. Returns
    value/* and critic/*, the same on every rank. Raises NotFinite, on every rank alike, as `step.train_batch` does."""
    cfg, batch = critic.cfg.trainer, _own(batch)
    updates: list[dict[str, float]] = []
    for _ in range(cfg.epochs_per_batch):
        for samples in updates_of(batch, cfg.updates_per_batch):
            part, at = (batch.select(samples), tokens_of(batch, samples)) if critic.steps_per_batch > 1 else (batch, slice(None))
            updates.append(_update(critic, part, old[at], returns[at], taken=len(updates)))
    critic.version += 1
    means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    return {**means, "critic/lr": updates[-1]["critic/lr"], **of_values(old[batch.loss_mask], returns[batch.loss_mask])}


def _update(critic: Critic, part: Batch, old: np.ndarray, returns: np.ndarray, taken: int) -> dict[str, float]:
    """One optimizer step, after `taken` others on the same batch."""
    micro_batches = critic.micro_batches(part)
    with critic.tracer.span("forward_backward", tokens=len(part.tokens), micro_batches=len(micro_batches)):
        sums = accumulate_gradients(critic, part, micro_batches, old, returns)
    with critic.tracer.span("optimizer"):
        step_taken = take_step(critic, sums["loss"], taken)
    held = sums["held"] / sums["weight"] if sums["weight"] else 0.0
    return {
        "value/loss": sums["loss"],
        "value/clip_frac": held,
        "critic/grad_norm": step_taken["grad_norm"],
        "critic/lr": step_taken["lr"],
    }


def accumulate_gradients(
    critic: Critic, part: Batch, micro_batches: list[MicroBatch], old: np.ndarray, returns: np.ndarray
) -> dict[str, float]:
    """Forward and backward over this rank's micro-batches; the gradient of sum_t w_t l_t over the update is left reduced, w as the
    policy's. Returns the sums of w_t x_t for the loss, the tokens that the bound held, and 1 ("weight")."""
    cfg, device = critic.cfg, critic.device.torch
    weights = token_weights(part, cfg.algorithm.aggregation, cfg.rollout.max_response_tokens)

    def on_device(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column.astype(np.float32)).to(device)

    def loss_of(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor], np.ndarray, Tensor]:
        at, found = micro_batch.trained, _at_rows(micro_batch, output)
        losses, held = clipped_value_loss(found, on_device(old[at]), on_device(returns[at]), cfg.critic.value_clip)
        w = on_device(weights[at])
        return (w * losses).sum(), weighted_sums(w, {"loss": losses.detach(), "held": held}), at, found.detach()

    sums, _ = accumulate(critic, micro_batches, loss_of, len(part.tokens))
    return sums


def _at_rows(micro_batch: MicroBatch, output: Tensor) -> Tensor:
    """fp32 [t], the values of a micro-batch's trained tokens. output fp32 [L, 1]."""
    return output[torch.from_numpy(micro_batch.rows).to(output.device), 0]


def _own(batch: Batch) -> Batch:
    """The experts that engines chose are the policy's."""
    return replace(batch, experts=None)
