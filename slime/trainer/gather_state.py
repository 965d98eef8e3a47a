"""An optimizer's whole state on every data-parallel rank, as megatron-core's reshardable checkpoints want it.

megatron-core's own function does the same with eight fp32 numbers a parameter alive at once on every rank; this one with three on the ranks
that write, in memory that is kept for the next save, and one more while ranks share the state.
"""

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from slime.trainer.host_buffers import HostBuffers

KEYS = ("param", "exp_avg", "exp_avg_sq")


def gather_state(part: DistributedOptimizer, name: Hashable, kept: HostBuffers | None, **_: Any) -> dict[Any, Any]:
    """In place of `DistributedOptimizer.get_parameter_state_dp_zero`: {buffer: {dtype: {key: fp32 [buffer's elements], on the host}}}.

    All ranks of the part's data-parallel group call it together. The tensors of the group's first rank, which is the one that writes them,
    lie in `kept` under names that begin with `name`, and are there after `kept.complete()`; those of the others are shapes alone. Without
    `kept` they are new zeros on every rank, to be loaded into.
    """
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, of_buckets),) = ranges.items()
        whole = {key: _memory(part, (name, number, key), buffer.numel_unpadded, kept) for key in KEYS}
        start = 0
        for bucket, of_bucket in zip(buffer.buckets, of_buckets, strict=True):
            end = start + bucket.numel_unpadded
            if kept is not None:
                for key, tensor in whole.items():
                    _fill(tensor[start:end], part, key, bucket.grad_data.numel(), of_bucket["param_map"])
            start = end
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _memory(part: DistributedOptimizer, name: Hashable, elements: int, kept: HostBuffers | None) -> torch.Tensor:
    if kept is None:
        return torch.zeros(elements, dtype=torch.float32, device="cpu")
    if part.data_parallel_group.rank() == 0:
        return kept.take(name, (elements,), torch.float32)
    return torch.empty(elements, dtype=torch.float32, device="meta")


def _fill(target: torch.Tensor, part: DistributedOptimizer, key: str, padded: int, param_map: dict[Any, Any]) -> None:
    """One kind of number of one bucket, `padded` elements with its padding."""
    group = part.data_parallel_group
    ranks = group.size()
    own = target if ranks == 1 else None
    for param, ranges in param_map.items():
        tensor = part._get_main_param_and_optimizer_states(param)[key].detach().view(-1)
        if own is None:
            own = torch.zeros(padded // ranks, dtype=torch.float32, device=tensor.device)
        own[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(tensor, non_blocking=True)
    if ranks == 1:
        return
    device = torch.device(torch.cuda.current_device())
    if own is None:  # a rank's part of a small bucket may be padding alone
        own = torch.zeros(padded // ranks, dtype=torch.float32, device=device)
    gathered = torch.empty(padded, dtype=torch.float32, device=device)
    dist.all_gather_into_tensor(gathered, own.to(device), group=group)
    if group.rank() == 0:
        target.copy_(gathered[: len(target)], non_blocking=True)
