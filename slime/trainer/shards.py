"""A checkpoint's shards: weights, optimizer and RNG of all ranks in megatron-core's distributed format.

The optimizer is saved fully reshardable, so that a checkpoint loads into another number of ranks; RNG states belong to one rank each and
are loaded where the layout is the one that saved them.
"""

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from slime.trainer.step import Trainer


def save(trainer: Trainer, directory: Path) -> None:
    """Write this rank's share into `directory`, which all ranks see. All ranks call it together and return when the bytes are on disk.

    Raises OSError on every rank where the disk refuses on one.
    """
    if trainer.parallel.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _state(trainer, loading=False, with_rng=True)
    with _failing_together(f"the trainer's shards could not be written to {directory}"):
        dist_checkpointing.save(state, str(directory), _InProcessSave("torch_dist", 1, thread_count=1))


def load(trainer: Trainer, directory: Path) -> None:
    """Continue from `directory`. All ranks call it together. Raises ValueError where there is no checkpoint, OSError on every rank
    where one cannot read its share."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ValueError(f"{directory} holds no trainer checkpoint (no metadata.json of megatron-core): check run.resume")
    same = dist_checkpointing.load_common_state_dict(str(directory))["layout"] == _layout(trainer)
    with _failing_together(f"the trainer's shards could not be read from {directory}"):
        state = dist_checkpointing.load(_state(trainer, loading=True, with_rng=same), str(directory))
    trainer.model.gpt.load_state_dict(state["model"])
    trainer.model.optimizer.load_state_dict(state["optimizer"])
    trainer.optimizer_steps, trainer.version = state["optimizer_steps"], state["version"]
    _restore_recipe(trainer)
    if same:
        _set_rng(state["rng"])


@contextlib.contextmanager
def _failing_together(what: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which all ranks raise together, rank 0 knows the causes of, and which is a BaseException (it would
    end the process), into an OSError."""
    try:
        yield
    except CheckpointException as error:
        causes = ["; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())]
        dist.broadcast_object_list(causes, src=0)
        raise OSError(f"{what}: {causes[0]}") from error


def _layout(trainer: Trainer) -> dict[str, Any]:
    """What has to agree for a rank's RNG state to be its own."""
    return {
        "world": trainer.parallel.world,
        "tensor_parallel": trainer.parallel.tp.size(),
        "pipeline_parallel": parallel_state.get_pipeline_model_parallel_world_size(),
        "device": trainer.device.torch.type,
    }


def _state(trainer: Trainer, loading: bool, with_rng: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    gpt, optimizer = trainer.model.gpt, trainer.model.optimizer
    state = {
        "model": gpt.sharded_state_dict(metadata=metadata),
        "optimizer": optimizer.sharded_state_dict(gpt.sharded_state_dict(metadata=metadata), is_loading=loading, metadata=metadata),
        "optimizer_steps": trainer.optimizer_steps,
        "version": trainer.version,
        "layout": _layout(trainer),
    }
    if with_rng:
        shape = (trainer.parallel.world,)
        state["rng"] = ShardedObject("rng", _rng(), shape, (trainer.parallel.rank,), replica_id=0)
    return state


def _restore_recipe(trainer: Trainer) -> None:
    """A checkpoint carries the optimizer's hyperparameters; those of the recipe count. (Rate and decay are set at every step.)"""
    cfg = trainer.cfg.trainer
    for group in trainer.model.optimizer.param_groups:
        group["betas"], group["eps"] = (cfg.beta1, cfg.beta2), cfg.eps


def _rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "tracker": get_cuda_rng_tracker().get_states()}


def _set_rng(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"])
    get_cuda_rng_tracker().set_states(rng["tracker"])


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Writes in the rank itself. megatron-core forks its writers, which is not safe beside the threads of Ray and gloo, and keeps a
    manager process that outlives a killed rank."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> AsyncRequest:
        filesystem_async._results_queue = queue.SimpleQueue()
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:
            return request
        transforms = request.async_fn.args[0]  # of the partial that megatron-core made

        def write(rank: int, buckets: list, results: queue.SimpleQueue) -> None:
            written = {}
            for index, bucket in enumerate(buckets):
                outcome: queue.SimpleQueue = queue.SimpleQueue()
                pending: queue.Queue = queue.Queue()
                pending.put(index)
                FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, pending, use_fsync=True)
                _, written[index] = outcome.get_nowait()
            failed = [outcome for outcome in written.values() if isinstance(outcome, Exception)]
            results.put(failed[0] if failed else written)  # megatron-core tells all ranks of a failure

        return request._replace(async_fn=write)
