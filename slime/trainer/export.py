"""Hugging Face tensors out of the ranks' shards, a bounded bucket at a time.

Every parameter has owners: the ranks that together hold it once, in the order of its shards. Rank 0, the leader, knows them all (the
atlas) and receives a bucket's shards from them.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from slime.models.hf_files import HFReader, HFWriter
from slime.models.map import ModelMap
from slime.sync.protocol import Bucket
from slime.trainer import blocks
from slime.trainer.distributed import Parallel
from slime.trainer.model import Model

Atlas = dict[str, list[int]]  # parameter name -> ranks that hold its shards, in the order of the shards


def make_atlas(model: Model, parallel: Parallel) -> Atlas:
    """All ranks call it together and get the same: who hands out what."""
    mine = {}
    for name, _ in model.tensors():
        expert = model.map.is_expert(name)
        group, copies = (parallel.etp, parallel.expert_dp) if expert else (parallel.tp, parallel.dp_cp)
        replicated = model.map.layout(name).replicated
        if copies.rank() == 0 and name in model.map.layouts and (group.rank() == 0 or not replicated):
            mine[name] = group.rank()
    everyone: list[dict[str, int]] = [{} for _ in range(parallel.world)]
    dist.all_gather_object(everyone, mine)
    atlas: Atlas = {}
    for name in model.map.parameters():
        shards = sorted((theirs[name], rank) for rank, theirs in enumerate(everyone) if name in theirs)
        assert [shard for shard, _ in shards] == list(range(len(shards))) and shards, f"{name}: held by {shards}"
        atlas[name] = [rank for _, rank in shards]
    return atlas


def plan_buckets(model_map: ModelMap, itemsize: int, bucket_bytes: int) -> list[list[str]]:
    """Parameter names in the map's order, divided so that a bucket's HF tensors take at most `bucket_bytes` or are one parameter's."""
    buckets: list[list[str]] = []
    room = 0
    for name, layout in model_map.parameters().items():
        size = itemsize * sum(tensor.size for tensor in layout.sources)
        if size > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(name)
        room -= size
    return buckets


@torch.no_grad()
def gather_bucket(model: Model, atlas: Atlas, names: list[str]) -> Bucket:
    """The HF tensors of these parameters, on the CPU, in the dtype that the model holds them in or `Model.narrow` says. All ranks call it
    together; the leader gets the tensors, the others an empty list."""
    tensors = {name: tensor.data for name, tensor in model.tensors()}
    bucket = gather_hf(model.map, atlas, tensors, names, model.device, lambda name: dtype_of(model, name))
    return [(name, tensor.to(model.narrow.get(name, tensor.dtype))) for name, tensor in bucket]


def dtype_of(model: Model, name: str) -> torch.dtype:
    """What a parameter is held in: routers keep their bias in fp32."""
    return torch.float32 if model.map.is_router_bias(name) else model.config.params_dtype


def gather_hf(
    model_map: ModelMap,
    atlas: Atlas,
    tensors: Mapping[str, Tensor],
    names: list[str],
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
) -> Bucket:
    """HF tensors of `names` from anything shaped like parameters (weights, gradients), this rank's by parameter name; see
    `gather_bucket`."""
    rank = dist.get_rank()
    shards: dict[str, list[Tensor]] = {}
    transfers = []
    for name in names:
        owners = atlas[name]
        if rank == 0:
            shape, dtype = model_map.local_shape(name, len(owners)), dtype_of(name)
            parts = [tensors[name] if owner == 0 else torch.empty(shape, dtype=dtype, device=device) for owner in owners]
            transfers += [dist.P2POp(dist.irecv, part, owner) for part, owner in zip(parts, owners, strict=True) if owner != 0]
            shards[name] = parts
        elif rank in owners:
            transfers.append(dist.P2POp(dist.isend, tensors[name].contiguous(), 0))
    for request in dist.batch_isend_irecv(transfers) if transfers else ():
        request.wait()
    return [hf for name, parts in shards.items() for hf in assemble(model_map, name, [part.cpu() for part in parts])]


def gather_all(model: Model, atlas: Atlas, bucket_bytes: int) -> Iterator[Bucket]:
    """All HF tensors, bucket after bucket; see `gather_bucket`."""
    for names in plan_buckets(model.map, model.config.params_dtype.itemsize, bucket_bytes):
        yield gather_bucket(model, atlas, names)


def assemble(model_map: ModelMap, name: str, shards: list[Tensor]) -> Bucket:
    """The HF tensors of one parameter from its shards."""
    layout = model_map.layout(name)
    tensors = {t.name: torch.empty(t.shape, dtype=shards[0].dtype) for t in layout.sources}
    for rank, shard in enumerate(shards):
        blocks.export(layout.moves(rank, len(shards)), shard, tensors)
    return list(tensors.items())


def write_hf(model: Model, atlas: Atlas, writer: HFWriter | None, bucket_bytes: int) -> None:
    """Write the model through `writer`, which the leader has, with the tensors that are carried along untrained. All ranks call it
    together."""
    for bucket in gather_all(model, atlas, bucket_bytes):
        for name, tensor in bucket:
            assert writer is not None, "the leader writes"
            writer.write(name, tensor)
    if writer is not None and model.map.kept_shapes:
        with HFReader(writer.source) as reader:
            for name in model.map.kept_shapes:
                writer.write(name, reader.read(name))
