"""Hugging Face tensors out of the ranks' shards, a bounded bucket at a time."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from slime.models.hf_files import HFWriter
from slime.models.map import ModelMap
from slime.sync.protocol import Bucket
from slime.trainer import blocks
from slime.trainer.distributed import Parallel
from slime.trainer.model import Model


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
def gather_bucket(model: Model, parallel: Parallel, names: list[str]) -> Bucket:
    """The HF tensors of these parameters, on the CPU, in the model's dtype. The ranks of one copy of the model call it together; its
    leader gets the tensors, the others an empty list."""
    parameters = dict(model.parameters())
    return gather_hf(model.map, parallel, {name: parameters[name].data for name in names})


def gather_hf(model_map: ModelMap, parallel: Parallel, tensors: Mapping[str, Tensor]) -> Bucket:
    """HF tensors from anything shaped like parameters (weights, gradients), by parameter name; see `gather_bucket`."""
    bucket: Bucket = []
    for name, tensor in tensors.items():
        bucket += assemble(model_map, name, _gather_shards(tensor, parallel, model_map.layout(name).replicated))
    return bucket


def gather_all(model: Model, parallel: Parallel, bucket_bytes: int) -> Iterator[Bucket]:
    """All HF tensors, bucket after bucket; see `gather_bucket`."""
    itemsize = next(model.gpt.parameters()).element_size()
    for names in plan_buckets(model.map, itemsize, bucket_bytes):
        yield gather_bucket(model, parallel, names)


def assemble(model_map: ModelMap, name: str, shards: list[Tensor]) -> Bucket:
    """The HF tensors of one parameter from the shards of all tensor-parallel ranks (one shard where each rank holds all of it)."""
    if not shards:
        return []
    layout = model_map.layout(name)
    tensors = {t.name: torch.empty(t.shape, dtype=shards[0].dtype) for t in layout.sources}
    tp_size = 1 if layout.replicated else len(shards)
    for rank, shard in enumerate(shards[:tp_size]):
        blocks.export(layout.moves(rank, tp_size), shard, tensors)
    return list(tensors.items())


def write_hf(model: Model, parallel: Parallel, writer: HFWriter | None, bucket_bytes: int) -> None:
    """Write the model through `writer`, which the leader of the first copy has. All ranks of that copy call it together."""
    for bucket in gather_all(model, parallel, bucket_bytes):
        for name, tensor in bucket:
            assert writer is not None, "the leader writes"
            writer.write(name, tensor)


def _gather_shards(shard: Tensor, parallel: Parallel, replicated: bool) -> list[Tensor]:
    """Leader: the shards of all tensor-parallel ranks, on the CPU. Others: nothing."""
    size = parallel.tp.size()
    if replicated or size == 1:
        return [shard.cpu()] if parallel.is_leader else []
    shards = [torch.empty_like(shard) for _ in range(size)] if parallel.is_leader else None
    dist.gather(shard.contiguous(), shards, group=parallel.tp, group_dst=0)
    return [s.cpu() for s in shards] if shards is not None else []
