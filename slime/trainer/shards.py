"""A checkpoint's shards: weights, optimizer and RNG of all ranks in megatron-core's distributed format, and a reference that has moved.

The optimizer is saved fully reshardable, so that a checkpoint loads into another number of ranks; RNG states belong to one rank each and
are loaded where the layout is the one that saved them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from slime.trainer import device
from slime.trainer.distributed import Parallel
from slime.trainer.gather_state import gather_state
from slime.trainer.host_buffers import HostBuffers
from slime.trainer.snapshot import Snapshot, hold
from slime.trainer.state import Trained

REFERENCE = "reference."  # before the names of its tensors
SHARDING = "fully_reshardable"  # megatron-core's name for an optimizer whose state does not depend on the layout


def snapshot(trained: Trained, directory: Path, buffers: HostBuffers) -> Snapshot:
    """This rank's share, in the host memory of `buffers`, to be written into `directory`, which all ranks see. All ranks call it together,
    between updates; they may train on as soon as it returns, and hold the next one in the same buffers once it is written.

    Host memory: the rank that is the first of those that hold the same shard takes its weights and three fp32 numbers a parameter (2 + 12
    bytes with bf16 weights), the others nothing. With data parallelism each needs one more number a parameter on its device meanwhile.
    """
    return hold(_state(trained, buffers, with_rng=True), directory, trained.parallel.saves, buffers)


def load(trained: Trained, directory: Path) -> None:
    """Continue from `directory`. All ranks call it together. Raises ValueError where there is no checkpoint, OSError on every rank
    where one cannot read its share."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise ValueError(f"{directory} holds no trainer checkpoint (no metadata.json of megatron-core): check run.resume")
    common = dist_checkpointing.load_common_state_dict(str(directory))
    same = common["layout"] == _layout(trained)
    trained.reference_moved = common.get("reference_moved", False) and trained.reference is not None
    with _failing_together(f"the trainer's shards could not be read from {directory}"):
        state = dist_checkpointing.load(_state(trained, None, with_rng=same), str(directory))
    for number, stage in enumerate(trained.model.stages):
        stage.module.load_state_dict(state[_key(trained, number)])
    if trained.reference is not None and trained.reference_moved:
        for number, gpt in enumerate(trained.reference.stages):
            gpt.load_state_dict(state[f"reference_{number}"])
    trained.optimizer_steps, trained.version = state["optimizer_steps"], state["version"]
    _load_optimizer(trained, state["optimizer"])
    if same:
        _set_rng(state["rng"])


def save_weights(gpt: GPTModel, parallel: Parallel, directory: Path) -> None:
    """Write a model without anything that training needs. All ranks call it together; raises what `Snapshot.write` raises."""
    state = {"model": gpt.sharded_state_dict(metadata=_metadata(parallel))}
    hold(state, directory, parallel.saves, None).write()


def load_weights(gpt: GPTModel, parallel: Parallel, directory: Path) -> None:
    """Fill a model from what a `snapshot` or `save_weights` wrote, in whatever layout. All ranks call it together. Raises OSError like
    `load`."""
    with _failing_together(f"the weights could not be read from {directory}"):
        state = dist_checkpointing.load({"model": gpt.sharded_state_dict(metadata=_metadata(parallel))}, str(directory))
    gpt.load_state_dict(state["model"])


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


def _layout(trained: Trained) -> dict[str, Any]:
    """What has to agree for a rank's RNG state to be its own."""
    return {"world": trained.parallel.world, "sizes": asdict(trained.parallel.sizes), "device": trained.device.torch.type}


def _key(trained: Trained, stage: int) -> str:
    """The model's name in a checkpoint: megatron-core's, one a virtual stage."""
    return "model" if len(trained.model.stages) == 1 else f"model{stage}"


def _metadata(parallel: Parallel) -> dict[str, Any]:
    """How megatron-core is to lay out what it saves."""
    return {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel.dp_cp,
    }


def _state(trained: Trained, kept: HostBuffers | None, with_rng: bool) -> dict[str, Any]:
    """The sharded state dict of this rank, the optimizer's state in `kept`; without `kept` it is there to be loaded into."""

    def model() -> dict[str, Any]:
        stages, metadata = enumerate(trained.model.stages), _metadata(trained.parallel)
        return {_key(trained, number): stage.module.sharded_state_dict(metadata=metadata) for number, stage in stages}

    state = {
        **model(),
        "optimizer": _optimizer_state(trained, model, kept),
        "optimizer_steps": trained.optimizer_steps,
        "version": trained.version,
        "layout": _layout(trained),
        "reference_moved": trained.reference_moved,
        **_reference(trained),
    }
    if with_rng:
        shape = (trained.parallel.world,)
        state["rng"] = ShardedObject("rng", _rng(), shape, (trained.parallel.rank,), replica_id=0)
    return state


def _reference(trained: Trained) -> dict[str, Any]:
    """The reference's weights under names of their own, where they are not those of a directory."""
    if trained.reference is None or not trained.reference_moved:
        return {}
    metadata = _metadata(trained.parallel)
    return {
        f"reference_{number}": _unprefixed(gpt.sharded_state_dict(prefix=REFERENCE, metadata=metadata))
        for number, gpt in enumerate(trained.reference.stages)
    }


def _unprefixed(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(REFERENCE): value for name, value in state.items()}


def _optimizer_state(trained: Trained, model: Callable[[], dict[str, Any]], kept: HostBuffers | None) -> dict[str, Any]:
    """Main weights and moments, named as their parameters are. Groups of parameters are left out: which there are depends on the layout
    (experts have an optimizer of their own under expert parallelism), and their rates are the recipe's."""
    metadata = _metadata(trained.parallel)
    for number, part in enumerate(_parts(trained)):
        part.get_parameter_state_dp_zero = functools.partial(gather_state, part, number, kept)
    states = [part.sharded_state_dict(model(), is_loading=kept is None, metadata=metadata) for part in _parts(trained)]
    return {str(number): state["param_state"] for number, state in enumerate(states)}


def _parts(trained: Trained) -> list[DistributedOptimizer]:
    """The optimizers of this rank that have anything to optimize: a pipeline stage may be without experts."""
    return [part for part in trained.model.optimizer.chained_optimizers if part.buffers]


def _load_optimizer(trained: Trained, state: dict[str, Any]) -> None:
    for number, part in enumerate(_parts(trained)):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = trained.optimizer_steps
        part.load_state_dict({**own, "param_state": state[str(number)], "param_state_sharding_type": SHARDING})


def _rng() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": device.random_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _set_rng(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["cpu"])
    device.set_random_state(rng["cuda"])
    get_cuda_rng_tracker().set_states(rng["tracker"])
