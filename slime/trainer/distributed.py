"""The process groups of a rank: torch.distributed, megatron-core's parallel_state, seeds. Everything else is handed its groups."""

import os
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from slime.config.parallel import ParallelSizes
from slime.trainer.device import Device


@dataclass(frozen=True)
class Parallel:
    """Where a rank stands. `tp`, `pp` and `cp` share one copy of the model: layers, stages, sequences; `dp` hold the same shard and see
    other sequences. Experts lie on `ep` x `etp` ranks, of which `expert_dp` hold the same."""

    rank: int
    world: int
    sizes: ParallelSizes
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    saves: dist.ProcessGroup  # all ranks, over gloo: for the thread that writes a checkpoint, beside training's collectives

    @property
    def is_leader(self) -> bool:
        """The rank that writes and sends what the others hand it."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits."""
        return self.pp.rank() == self.pp.size() - 1


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """Rank 0: the meeting point of the ranks, on a free port of this host (`store.port`)."""
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The other ranks: connect to rank 0's store. Raises DistStoreError/DistNetworkError when it does not answer in time."""
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join_groups(device: Device, store: dist.Store, rank: int, world: int, sizes: ParallelSizes, seed: int, timeout_s: float) -> Parallel:
    """Meet the other ranks, divide them into groups, seed this rank. A collective that takes longer than `timeout_s` fails."""
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Parallel(
        rank=rank,
        world=world,
        sizes=sizes,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        saves=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)),
    )


def use_interface_of(address: str) -> None:
    """Gloo talks over the network interface that has this address, unless GLOO_SOCKET_IFNAME says otherwise."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def on_this_host(node: str) -> int:
    """How many ranks gave the same name of their node. All ranks call it together."""
    nodes = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, node)
    return nodes.count(node)


def leave_groups() -> None:
    """Take this process out of its groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
