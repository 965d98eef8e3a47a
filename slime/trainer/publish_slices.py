"""Which elements of the model a rank publishes, and where they lie in the Hugging Face (HF) tensors.

Every element of every HF tensor belongs to one rank. Among the ranks that hold copies of a shard (data and context parallel ones), each
takes an even, contiguous slice of it, a piece; of what all tensor-parallel ranks hold (norms), those of the first take all. Elements of a
shard that have no HF source (padding of the vocabulary) belong to no piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.layout import Block, Move
from slime.models.map import ModelMap
from slime.sync import own_blocks
from slime.sync.bits import INTEGERS
from slime.sync.diff import Grid
from slime.sync.records import BLOCK, ModelSpec, TensorSpec
from slime.trainer.distributed import Parallel
from slime.trainer.export import dtype_of
from slime.trainer.model import Model


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches that are contiguous in a shard and in one block of an HF tensor. They are ordered by, and tile a stretch of, the shard."""

    target: np.ndarray  # int64 [r], first position in the shard
    source: np.ndarray  # int64 [r], first position in the HF tensor
    length: np.ndarray  # int64 [r]
    tensor: np.ndarray  # int64 [r], number of the HF tensor
    block: np.ndarray  # int64 [r], number of the block in the Grid

    def clip(self, start: int, stop: int) -> "Runs":
        """The part of it in [start, stop) of the shard."""
        of = slice(np.searchsorted(self.target, start, "right") - 1, np.searchsorted(self.target, stop, "left"))
        low = np.maximum(self.target[of], start)
        high = np.minimum(self.target[of] + self.length[of], stop)
        return Runs(low, self.source[of] + low - self.target[of], high - low, self.tensor[of], self.block[of])


@dataclass(frozen=True, slots=True)
class Stretches:
    """All bits that a rank holds of an HF tensor, by where they lie in it."""

    source: np.ndarray  # int64 [r]
    length: np.ndarray  # int64 [r]
    bits: np.ndarray  # [sum of length], one stretch after the other


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of this rank's shard of a parameter."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype  # that the HF tensors are published in
    runs: Runs
    tensors: tuple[int, ...]  # the HF tensors that it is part of, ascending

    def __len__(self) -> int:
        return self.stop - self.start

    def bits_of(self, shards: dict[str, Tensor]) -> Tensor:
        """What this rank's `shards` hold of it, as integers [len]; a view, unless it is published in another dtype."""
        part = shards[self.name].view(-1)[self.start : self.stop].to(self.dtype)
        return part.view(INTEGERS[part.element_size()])

    def stretches(self, tensor: int, bits: np.ndarray) -> Stretches:
        """What this piece's bits [len] hold of a tensor."""
        mine = self.runs.tensor == tensor
        held = bits if mine.all() else bits[np.repeat(mine, self.runs.length)]
        return Stretches(self.runs.source[mine], self.runs.length[mine], held)


def runs_of_pieces(pieces: Sequence[Piece]) -> own_blocks.Runs:
    """All runs of the pieces, which are the memories."""
    columns = [
        np.stack([np.full_like(p.runs.source, n), p.runs.target - p.start, p.runs.tensor, p.runs.source, p.runs.length])
        for n, p in enumerate(pieces)
    ]
    return own_blocks.Runs(*np.concatenate([np.zeros((5, 0), np.int64), *columns], axis=1))


def model_spec(model: Model) -> ModelSpec:
    """The HF tensors in the map's order, in the dtypes that they are exported in."""
    return ModelSpec(
        tuple(
            TensorSpec(t.name, t.shape, str(model.narrow.get(t.name, dtype_of(model, name))).removeprefix("torch."))
            for name, layout in model.map.parameters().items()
            for t in layout.sources
        )
    )


def own_pieces(model: Model, parallel: Parallel, spec: ModelSpec) -> list[Piece]:
    """What this rank publishes, in the model's order."""
    pieces, grid = [], Grid.of(spec)
    for name, _ in model.tensors():
        expert = model.map.is_expert(name)
        group, copies = (parallel.etp, parallel.expert_dp) if expert else (parallel.tp, parallel.dp_cp)
        if name not in model.map.layouts or (model.map.layout(name).replicated and group.rank() > 0):
            continue
        runs = runs_of(model.map.moves(name, group.rank(), group.size()), spec, grid)
        total = int(runs.length.sum())
        start, stop = (total * of // copies.size() for of in (copies.rank(), copies.rank() + 1))
        if start < stop:
            mine = runs.clip(start, stop)
            pieces.append(Piece(name, start, stop, _published_in(model.map, name, spec), mine, tuple(np.unique(mine.tensor).tolist())))
    return pieces


def _published_in(model_map: ModelMap, name: str, spec: ModelSpec) -> torch.dtype:
    (dtype,) = {spec.tensors[spec.index[t.name]].dtype for t in model_map.layout(name).sources}
    return getattr(torch, dtype)


def runs_of(moves: Sequence[Move], spec: ModelSpec, grid: Grid) -> Runs:
    """The moves of a shard as runs; they tile it from its first element to the first that has no source."""
    columns = []
    for move in moves:
        source, target = _starts(move.source), _starts(move.target)
        of = np.full_like(source, spec.index[move.hf])
        columns.append(np.stack([target, source, np.full_like(source, move.source.shape[-1]), of]))
    if not columns:
        return Runs(*np.zeros((5, 0), np.int64))
    table = np.concatenate(columns, axis=1)
    target, source, length, tensor = _cut_at_blocks(*_joined(table[:, np.argsort(table[0])]))
    assert target[0] == 0 and (target[1:] == target[:-1] + length[:-1]).all(), f"the moves of {moves[0].hf} do not tile their shard"
    return Runs(target, source, length, tensor, grid.first[tensor] + source // BLOCK)


def _starts(block: Block) -> np.ndarray:
    """int64 [n], where each contiguous stretch of a block begins."""
    assert block.strides[-1] == 1, block
    starts = np.array([block.offset], np.int64)
    for length, stride in zip(block.shape[:-1], block.strides[:-1], strict=True):
        starts = (starts[:, None] + np.arange(length, dtype=np.int64) * stride).reshape(-1)
    return starts


def _joined(table: np.ndarray) -> np.ndarray:
    """Runs (target, source, length, tensor) [4, r] with those that continue one another as one."""
    target, source, length, tensor = table
    goes_on = (target[1:] - target[:-1] == length[:-1]) & (source[1:] - source[:-1] == length[:-1]) & (tensor[1:] == tensor[:-1])
    first = np.flatnonzero(np.append(True, ~goes_on))
    return np.stack([target[first], source[first], np.add.reduceat(length, first), tensor[first]])


def _cut_at_blocks(target: np.ndarray, source: np.ndarray, length: np.ndarray, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
    """The runs cut where a block of their HF tensor ends."""
    touched = (source + length - 1) // BLOCK - source // BLOCK + 1
    of = np.repeat(np.arange(len(source)), touched)
    number = np.arange(len(of)) - np.repeat(np.cumsum(touched) - touched, touched)
    block = source[of] // BLOCK + number
    low = np.maximum(source[of], block * BLOCK)
    high = np.minimum(source[of] + length[of], (block + 1) * BLOCK)
    return target[of] + low - source[of], low, high - low, tensor[of]
