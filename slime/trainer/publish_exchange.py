"""The ranks' shares of parts, each brought to the rank that encodes it.

Blocks that one rank holds whole are coded there and come as bytes, those of all parts at a time. What several ranks hold some of, and what
is listed whole, comes as changes. In a round of those every rank receives at most one part, so that memory is bounded by a part's changes
and all ranks encode at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from slime.sync import wire
from slime.sync.diff import joined, merge
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.trainer.publish_slices import Stretches

COLUMNS = 3  # arrays that a share of a tensor consists of


def gather_blocks(parts: Sequence[range], mine: Sequence[wire.Blocks], device: torch.device) -> list[wire.Blocks]:
    """All ranks' blocks of this rank's parts, of which rank r has the parts r, r + world, ... All ranks call it together."""
    world = dist.get_world_size()
    if world == 1:
        return list(mine)
    shares: dict[int, list[wire.Blocks]] = {}
    for blocks in mine:
        for tensor, of_tensor in blocks.by_tensor():
            shares.setdefault(tensor, []).append(of_tensor)
    none = np.empty(0, np.uint8)
    sent = {t: (joined([s.rows for s in of]).view(np.uint8), joined([s.streams() for s in of]), none) for t, of in shares.items()}
    theirs = [[tensor for part in parts[r::world] for tensor in part] for r in range(world)]
    return [wire.Blocks.of(rows.view(wire.ROW), streams) for _, (rows, streams, _) in _deliver(theirs, sent, device)]


def gather_changes(spec: ModelSpec, parts: Sequence[range], mine: Mapping[int, Sequence[Changes]], device: torch.device) -> list[Changes]:
    """Give rank r all ranks' changes of the tensors parts[r], of which `mine` are this rank's disjoint shares by tensor. Returns those of
    this rank's part, in the tensors' order, without tensors that have none. There may be fewer parts than ranks. All ranks call it
    together."""
    sent = {tensor: _columns(spec.tensors[tensor], shares) for tensor, shares in mine.items()}
    found: dict[int, list[Changes]] = {}
    for tensor, (positions, old, new) in _deliver(parts, sent, device):
        of = spec.tensors[tensor]
        share = Changes(tensor, positions.view(_place(of)).astype(np.int64), old.view(of.type.bits), new.view(of.type.bits))
        found.setdefault(tensor, []).append(share)
    return [merge(found[tensor]) for tensor in sorted(found)]


def gather_tensors(
    spec: ModelSpec, parts: Sequence[range], mine: Mapping[int, Sequence[Stretches]], device: torch.device
) -> dict[int, np.ndarray]:
    """Give rank r the tensors of parts[r] that ranks have stretches of: all bits of each, 1-D. All ranks call it together."""
    sent = {}
    for tensor, shares in mine.items():
        sent[tensor] = tuple(np.concatenate(column) for column in zip(*((s.source, s.length, s.bits) for s in shares), strict=True))
    found: dict[int, np.ndarray] = {}
    for tensor, (source, length, bits) in _deliver(parts, sent, device):
        of = spec.tensors[tensor]
        whole = found.setdefault(tensor, np.empty(of.size, of.type.bits))
        begin, values = 0, bits.view(of.type.bits)
        for start, n in zip(source.view(np.int64).tolist(), length.view(np.int64).tolist(), strict=True):
            whole[start : start + n] = values[begin : begin + n]
            begin += n
    return found


def _place(tensor: TensorSpec) -> np.dtype:
    """What a position takes on the way."""
    return np.dtype("<u4" if tensor.size <= 1 << 32 else "<i8")


def _columns(tensor: TensorSpec, shares: Sequence[Changes]) -> tuple[np.ndarray, ...]:
    """All positions, all old bits, all new bits."""
    positions = np.empty(sum(map(len, shares)), _place(tensor))
    np.concatenate([share.positions for share in shares], out=positions, casting="unsafe")
    return positions, joined([share.old for share in shares]), joined([share.new for share in shares])


def _deliver(
    parts: Sequence[Sequence[int]], mine: Mapping[int, tuple[np.ndarray, ...]], device: torch.device
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Send COLUMNS arrays for each tensor of `mine` to the rank that has its part; yields (tensor, bytes of its arrays) for every rank that
    sent some for a tensor of this rank's part."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = [tensor for part in parts for tensor in part]
    encoder = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # of each tensor
    sizes = np.zeros((len(tensors), COLUMNS), np.int64)  # in bytes
    for i, tensor in enumerate(tensors):
        if tensor in mine:
            sizes[i] = [column.nbytes for column in mine[tensor]]
    announced = _all_gather(sizes, device)  # [world, tensors, COLUMNS]
    traffic = announced.sum(2) @ (encoder[:, None] == np.arange(world))  # [from, to]
    sent = np.empty(traffic[rank].sum(), np.uint8)
    offset = 0
    for tensor in tensors:
        for column in mine.get(tensor, ()):
            sent[offset : offset + column.nbytes] = column.view(np.uint8)
            offset += column.nbytes
    assert offset == len(sent), "what is sent is not what was announced"
    received = _all_to_all(sent, traffic[rank], traffic[:, rank], device)
    offset = 0
    for theirs in announced[:, encoder == rank]:
        for tensor, columns in zip(parts[rank] if rank < len(parts) else (), theirs.tolist(), strict=True):
            ends = np.cumsum([offset, *columns]).tolist()
            if ends[-1] > offset:
                yield tensor, tuple(received[a:b] for a, b in pairwise(ends))
            offset = ends[-1]
    assert offset == len(received), "what came is not what was announced"


def _all_gather(ours: np.ndarray, device: torch.device) -> np.ndarray:
    """int64 of one shape from every rank: [world, ...]."""
    tensor = torch.from_numpy(ours).to(device)
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor)
    return torch.stack(everyone).cpu().numpy()


def _all_to_all(sent: np.ndarray, to: np.ndarray, of: np.ndarray, device: torch.device) -> np.ndarray:
    """Bytes to every rank, to[r] of them, from every rank, of[r] of them, each in the order of the ranks."""
    if dist.get_world_size() == 1:
        return sent
    received = torch.empty(int(of.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.from_numpy(sent).to(device), of.tolist(), to.tolist())
    return received.cpu().numpy()
