"""Micro-batches through the model, forward or forward and backward, by megatron-core's schedules."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.trainer.attention import PackedSequences
from slime.trainer.frozen import Frozen
from slime.trainer.model import Model
from slime.trainer.packing import MicroBatch

# (micro-batch, logits [L, this rank's share of the vocabulary], or a critic's values [L, 1]) -> (loss, a scalar; anything to collect)
OnOutput = Callable[[MicroBatch, Tensor], tuple[Tensor, Any]]


def run_micro_batches(
    model: Model | Frozen,
    micro_batches: list[MicroBatch],
    on_output: OnOutput,
    *,
    device: torch.device,
    tp: torch.distributed.ProcessGroup,
    cp_size: int = 1,
    forward_only: bool = False,
) -> list[Any]:
    """Run all micro-batches and return what `on_output` collected, in order; on ranks of the last pipeline stage, nothing on others.

    Unless `forward_only`, the sum of the losses is differentiated and gradients are reduced over ranks, ready for the optimizer.
    All ranks call this together with equally many micro-batches.
    """

    def forward_step(rows: Iterator[MicroBatch], stage: Any) -> tuple[Tensor, Callable]:
        micro_batch = next(rows)

        def loss_of(output: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, collected = on_output(micro_batch, output.squeeze(0))
            return loss, torch.zeros((), dtype=torch.int, device=device), collected  # no token count: nothing is divided by it

        return output_of(model, stage, micro_batch, device, tp), loss_of

    several = len(model.stages) > 1
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in model.stages] if several else iter(micro_batches),
            model=model.stages,
            num_microbatches=len(micro_batches),
            seq_length=max(len(m.tokens) for m in micro_batches) * cp_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def output_of(
    model: Model | Frozen, stage: Any, micro_batch: MicroBatch, device: torch.device, tp: torch.distributed.ProcessGroup
) -> Tensor:
    """What one of the model's stages makes of a micro-batch: of the last one logits [1, L, this rank's share of the vocabulary], or
    values [1, L, 1]."""
    seen = _seen_by_routers(model, micro_batch, tp)
    experts = None if micro_batch.experts is None else torch.from_numpy(micro_batch.experts[seen]).to(device).long().transpose(0, 1)
    padding = torch.from_numpy(micro_batch.source[seen] < 0).to(device)
    tokens, positions = (torch.from_numpy(x).to(device) for x in (micro_batch.tokens, micro_batch.positions))
    packing = PackedSequences.of(micro_batch.lengths, positions, experts, padding)
    return stage(tokens[None], positions[None], None, packed_seq_params=packing)


def _seen_by_routers(model: Model | Frozen, micro_batch: MicroBatch, tp: torch.distributed.ProcessGroup) -> slice:
    """The tokens of a row that this rank's routers see: of tensor-parallel ranks, each sees a stretch."""
    if not model.config.sequence_parallel:
        return slice(None)
    seen = len(micro_batch.tokens) // tp.size()
    return slice(seen * tp.rank(), seen * (tp.rank() + 1))
