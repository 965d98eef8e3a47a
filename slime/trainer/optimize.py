"""Gradients of an update's loss, and the optimizer step that they lead to: of the policy and of a critic alike."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from slime.config.exits import NotFinite
from slime.config.of_critic import optimizer_steps
from slime.trainer.packing import MicroBatch
from slime.trainer.passes import gather, run
from slime.trainer.schedule import learning_rate
from slime.trainer.state import Trained

# Of a micro-batch's t trained tokens and the model's output: (loss, sums over the tokens by name, positions [t], what they got fp32 [t])
LossOf = Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor], np.ndarray, Tensor]]


def accumulate(trained: Trained, micro_batches: list[MicroBatch], loss_of: LossOf, tokens: int) -> tuple[dict[str, float], np.ndarray]:
    """Forward and backward over this rank's micro-batches of an update of `tokens`; gradients of the whole update's loss, which is the sum
    of the micro-batches', are left reduced. Returns the sums over the whole update, and what every token got (float32 [tokens])."""

    def on_output(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, tuple]:
        loss, sums, at, found = loss_of(micro_batch, output)
        return loss, (sums, (at, found))

    for stage in trained.model.stages:
        stage.zero_grad_buffer()
    trained.model.optimizer.zero_grad()
    collected = run(trained, micro_batches, on_output)
    found = gather(trained, [kept for _, kept in collected], tokens)
    return _sum_over_ranks(trained, [sums for sums, _ in collected]), found


def weighted_sums(weights: Tensor, per_token: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars in float64: sum_t w_t x_t of each, and of 1 ("weight"). weights fp32 [t], x [t]."""
    per_token = {"weight": torch.ones_like(weights), **per_token}
    return {name: (weights.double() * values.double()).sum() for name, values in per_token.items()}


def take_step(trained: Trained, loss: float, taken: int) -> dict[str, float]:
    """Clip the accumulated gradient and take an optimizer step, after `taken` others on the same batch. Returns grad_norm (before
    clipping) and lr.

    Raises NotFinite where loss or norm are not finite; they are those of all ranks, so that all of them refuse the step.
    """
    optimizer, cfg = trained.model.optimizer, trained.cfg.trainer
    lr = learning_rate(cfg, trained.optimizer_steps, optimizer_steps(trained.cfg))
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise NotFinite(_not_finite(trained, loss, norm, taken))
    if cfg.clip_grad > 0:
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=cfg.clip_grad, total_norm=norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = cfg.weight_decay * group["wd_mult"]
    optimizer.step_with_ready_grads()
    trained.optimizer_steps += 1
    return {"grad_norm": norm, "lr": lr}


def _not_finite(trained: Trained, loss: float, norm: float, taken: int) -> str:
    cfg, of = trained.cfg.trainer, trained.steps_per_batch
    which = f", optimizer step {taken + 1} of {of}" if of > 1 else ""
    before = f" (the {taken} before it on this batch were: only the last checkpoint is whole)" if taken else trained.BESIDE
    clip = f"lower trainer.clip_grad={cfg.clip_grad:g}" if cfg.clip_grad else "set trainer.clip_grad above 0"
    return (
        f"{trained.UPDATE} {trained.version + 1}{which}: the loss is {loss:g} and the gradient has norm {norm:g}; the step was not taken"
        f"{before}. Lower {trained.RATE}={cfg.lr:g}, {clip}, or look for {trained.READS} that are not finite"
    )


def _sum_over_ranks(trained: Trained, sums: list[dict[str, Tensor]]) -> dict[str, float]:
    """Add up the micro-batches' sums, over all ranks that hold different tokens."""
    pp = trained.parallel.pp
    total: list[dict[str, float] | None] = [None]
    if trained.parallel.is_last_stage:
        names = sorted(sums[0])
        added = torch.stack([torch.stack([s[name] for name in names]) for s in sums]).sum(0)
        dist.all_reduce(added, group=trained.parallel.dp_cp)
        total = [dict(zip(names, added.tolist(), strict=True))]
    if pp.size() > 1:
        dist.broadcast_object_list(total, group=pp, group_src=pp.size() - 1, device=trained.device.torch)
    assert total[0] is not None
    return total[0]
