"""An optimizer's whole state on every data-parallel rank, as megatron-core's reshardable checkpoints want it.

megatron-core's own function does the same with eight fp32 numbers a parameter alive at once; this one with three, and a fourth while ranks
share the state.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KEYS = ("param", "exp_avg", "exp_avg_sq")


def gather_state(part: DistributedOptimizer, fresh: set[int], *, empty_data: bool = False, **_: Any) -> dict[Any, Any]:
    """In place of `DistributedOptimizer.get_parameter_state_dp_zero`: {buffer: {dtype: {key: fp32 [buffer's elements], on the host}}}.

    All ranks of the part's data-parallel group call it together. `fresh` gets the addresses of the storages that were made. With
    `empty_data` they hold zeros, to be loaded into.
    """
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, of_buckets),) = ranges.items()
        whole = {key: torch.zeros(buffer.numel_unpadded, dtype=torch.float32, device="cpu") for key in KEYS}
        fresh.update(tensor.untyped_storage().data_ptr() for tensor in whole.values())
        start = 0
        for bucket, of_bucket in zip(buffer.buckets, of_buckets, strict=True):
            end = start + bucket.numel_unpadded
            if not empty_data:
                for key, tensor in whole.items():
                    _fill(tensor[start:end], part, key, bucket.grad_data.numel(), of_bucket["param_map"])
            start = end
        state[number] = {dtype: {**whole, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _fill(target: torch.Tensor, part: DistributedOptimizer, key: str, padded: int, param_map: dict[Any, Any]) -> None:
    """One kind of number of one bucket, `padded` elements with its padding."""
    group = part.data_parallel_group
    ranks = group.size()
    own = target if ranks == 1 else None
    for param, ranges in param_map.items():
        tensor = part._get_main_param_and_optimizer_states(param)[key].detach().view(-1)
        if own is None:
            own = torch.zeros(padded // ranks, dtype=torch.float32, device=tensor.device)
        own[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(tensor)
    if ranks == 1:
        return
    device = torch.device(torch.cuda.current_device())
    if own is None:  # a rank's part of a small bucket may be padding alone
        own = torch.zeros(padded // ranks, dtype=torch.float32, device=device)
    gathered = torch.empty(padded, dtype=torch.float32, device=device)
    dist.all_gather_into_tensor(gathered, own.to(device), group=group)
    target.copy_(gathered[: len(target)])
