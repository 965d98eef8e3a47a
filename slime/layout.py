"""The one index algebra: strided block moves between Hugging Face tensors and tensor-parallel shards (numpy only).

A megatron-core parameter on one rank is assembled from rectangles of Hugging Face (HF) tensors. A `Move` is one such rectangle, seen
from both sides as a strided `Block` of a contiguous tensor; loading copies source to target, exporting copies target to source, and
a changed position of the shard is translated to its position in the HF tensor. A `Layout` declares how one whole parameter relates
to its HF tensors and yields the moves of any shard:

    Whole   the same tensor on every tensor-parallel (TP) rank                    norms
    Rows    split along dimension 0                                              column-parallel linear layers
    Cols    split along dimension 1                                              row-parallel linear layers
    Vocab   split along dimension 0 after padding rows that have no HF source    embedding, output layer
    QKV     q, k and v interleaved by query group, split between groups          attention's fused projection
    GLU     gate and up stacked, each split apart: a rank holds [gate_r; up_r]   the MLP's fused projection
    GateUp  the same from one tensor that holds [gate; up]                       GLM-4's MLP

Nothing here knows of layers, experts or pipeline stages: those are in the names that a model map gives to its layouts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Elements of a contiguous tensor: `offset + sum(index * strides)` for every index into `shape`. Strides count elements and nest:
    each is larger than the reach of all that follow it, so a position lies in at most one place of the block."""

    offset: int
    shape: Shape
    strides: Shape

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.strides) and self.offset >= 0 and min(self.shape, default=1) > 0, self
        reach = 0
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            assert stride > reach, f"{self}: strides do not nest"
            reach += (length - 1) * stride

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def view(self, flat: np.ndarray) -> np.ndarray:
        """The block as a view [shape] into a contiguous 1-D array; writable where `flat` is."""
        assert flat.ndim == 1 and flat.flags.c_contiguous and self.end <= flat.size, (self, flat.shape)
        strides = [s * flat.itemsize for s in self.strides]
        return as_strided(flat[self.offset :], self.shape, strides, writeable=flat.flags.writeable)

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bool [n], int64 [n]): which flat positions (int64 [n]) lie in the block, and their index in the block's own order."""
        rest = positions - self.offset
        inside = rest >= 0
        index = np.zeros_like(rest)
        for length, stride in zip(self.shape, self.strides, strict=True):
            step = rest // stride
            inside &= step < length
            index = index * length + step
            rest = rest - step * stride
        return inside & (rest == 0), index

    def at(self, index: np.ndarray) -> np.ndarray:
        """int64 [n], flat positions of these indices (int64 [n]) in the block's own order; the inverse of `find`."""
        positions = np.full_like(index, self.offset)
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            positions += index % length * stride
            index = index // length
        return positions


@dataclass(frozen=True, slots=True)
class Move:
    """`source` in the HF tensor named `hf` and `target` in a rank's shard are the same values in the same order."""

    hf: str
    source: Block
    target: Block

    def __post_init__(self) -> None:
        assert self.source.shape == self.target.shape, self


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor of a Hugging Face checkpoint."""

    name: str
    shape: Shape

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Elements of one row (of one entry of dimension 0)."""
        return prod(self.shape[1:])


class Layout(ABC):
    """How one parameter of the model, whole or as a TP shard, is made of HF tensors."""

    replicated: ClassVar[bool] = False  # True: every TP rank holds all of it, so an export takes one rank's copy

    @property
    @abstractmethod
    def sources(self) -> tuple[HFTensor, ...]:
        """The HF tensors it is made of."""

    @abstractmethod
    def local_shape(self, tp_size: int) -> Shape:
        """Shape of a shard. Raises ValueError where tp_size does not divide what is split."""

    @abstractmethod
    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        """The moves of one shard. Raises ValueError like `local_shape`."""

    def padding(self, tp_rank: int, tp_size: int) -> int:
        """Elements of a shard that have no HF source; they lie at its end."""
        return 0


@dataclass(frozen=True, slots=True)
class Whole(Layout):
    """The same tensor on every rank."""

    hf: HFTensor
    replicated: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.hf,)

    def local_shape(self, tp_size: int) -> Shape:
        return self.hf.shape

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        return (_run(self.hf, 0, 0, self.hf.size),)


@dataclass(frozen=True, slots=True)
class Rows(Layout):
    """Dimension 0 split over the ranks; weights [out, in] and biases [out]. Of attention it holds `heads`, which stay whole."""

    hf: HFTensor
    heads: int | None = None

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.hf,)

    def local_shape(self, tp_size: int) -> Shape:
        if self.heads is not None:
            _share(self.heads, tp_size, f"heads of {self.hf.name}")
        return (_share(self.hf.shape[0], tp_size, f"rows of {self.hf.name}"), *self.hf.shape[1:])

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size))
        return (_run(self.hf, tp_rank * size, 0, size),)


@dataclass(frozen=True, slots=True)
class Cols(Layout):
    """Dimension 1 of a weight [out, in] split over the ranks."""

    hf: HFTensor

    def __post_init__(self) -> None:
        assert len(self.hf.shape) == 2, self

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.hf,)

    def local_shape(self, tp_size: int) -> Shape:
        return (self.hf.shape[0], _share(self.hf.shape[1], tp_size, f"columns of {self.hf.name}"))

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        shape = self.local_shape(tp_size)
        source = Block(tp_rank * shape[1], shape, (self.hf.shape[1], 1))
        return (Move(self.hf.name, source, Block(0, shape, (shape[1], 1))),)


@dataclass(frozen=True, slots=True)
class Vocab(Layout):
    """Rows [vocab, ...] padded to `padded` rows at the end, then split over the ranks. Padding rows have no HF source."""

    hf: HFTensor
    padded: int

    def __post_init__(self) -> None:
        assert self.padded >= self.hf.shape[0], self

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.hf,)

    def local_shape(self, tp_size: int) -> Shape:
        return (_share(self.padded, tp_size, f"padded rows of {self.hf.name}"), *self.hf.shape[1:])

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size))
        length = size - self.padding(tp_rank, tp_size)
        return (_run(self.hf, tp_rank * size, 0, length),) if length else ()

    def padding(self, tp_rank: int, tp_size: int) -> int:
        size = prod(self.local_shape(tp_size))
        return min(size, max(0, (tp_rank + 1) * size - self.hf.size))


@dataclass(frozen=True, slots=True)
class QKV(Layout):
    """Attention's fused projection, as megatron-core orders it: for each query group its q heads, its k head, its v head; weights
    [(heads + 2 groups) head_dim, in] and biases [(heads + 2 groups) head_dim]. A rank holds whole groups or, where there are more ranks
    than groups, an even stretch of one group's rows. megatron.core.transformer.attention.SelfAttention.get_query_key_value_tensors reads
    this order."""

    q: HFTensor
    k: HFTensor
    v: HFTensor
    heads: int
    groups: int
    head_dim: int

    def __post_init__(self) -> None:
        assert self.heads % self.groups == 0, self
        for part, heads in zip(self.sources, (self.heads, self.groups, self.groups), strict=True):
            assert part.shape == (heads * self.head_dim, *self.q.shape[1:]), (part, self)

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.q, self.k, self.v)

    def local_shape(self, tp_size: int) -> Shape:
        if tp_size > self.groups:
            _share(self.heads, tp_size, f"heads of {self.q.name}")
            if tp_size % self.groups:
                raise ValueError(
                    f"trainer.tensor_parallel={tp_size} cannot share out the {self.groups} key/value heads of {self.k.name}; choose a "
                    f"divisor or a multiple of {self.groups}"
                )
        else:
            _share(self.groups, tp_size, f"key/value heads of {self.k.name}")
        rows = (self.heads + 2 * self.groups) * self.head_dim
        return (_share(rows, tp_size, f"rows of {self.q.name}, {self.k.name} and {self.v.name} together"), *self.q.shape[1:])

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size))
        group_size = sum(part.size for part in self.sources) // self.groups  # elements of a group's q, k and v together
        moves, offset = [], 0
        for part in self.sources:
            share = part.size // self.groups  # elements of a group's share of this tensor
            if tp_size <= self.groups:
                groups = self.groups // tp_size
                source = Block(tp_rank * groups * share, (groups, share), (share, 1))
                moves.append(Move(part.name, source, Block(offset, (groups, share), (group_size, 1))))
            else:
                group, first = divmod(tp_rank * size, group_size)  # the shard is [first, first + size) of this group
                start, end = max(offset, first), min(offset + share, first + size)
                if start < end:
                    moves.append(_run(part, group * share + start - offset, start - first, end - start))
            offset += share
        return tuple(moves)


@dataclass(frozen=True, slots=True)
class GLU(Layout):
    """The fused projection of a gated MLP, [gate; up] along dimension 0, each half split over the ranks by itself."""

    gate: HFTensor
    up: HFTensor

    def __post_init__(self) -> None:
        assert self.gate.shape == self.up.shape, self

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.gate, self.up)

    def local_shape(self, tp_size: int) -> Shape:
        return (2 * _share(self.gate.shape[0], tp_size, f"rows of {self.gate.name}"), *self.gate.shape[1:])

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size)) // 2
        return tuple(_run(part, tp_rank * size, half * size, size) for half, part in enumerate(self.sources))


@dataclass(frozen=True, slots=True)
class GateUp(Layout):
    """The fused projection of a gated MLP from one HF tensor [gate; up]."""

    hf: HFTensor

    def __post_init__(self) -> None:
        assert self.hf.shape[0] % 2 == 0, self

    @property
    def sources(self) -> tuple[HFTensor, ...]:
        return (self.hf,)

    def local_shape(self, tp_size: int) -> Shape:
        return (2 * _share(self.hf.shape[0] // 2, tp_size, f"rows of each half of {self.hf.name}"), *self.hf.shape[1:])

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size)) // 2
        return tuple(_run(self.hf, half * self.hf.size // 2 + tp_rank * size, half * size, size) for half in (0, 1))


def to_hf(moves: Sequence[Move], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Translate flat positions of a shard (int64 [n]) into (which, where): `moves[which].hf` (int32 [n]) and the flat position in that
    HF tensor (int64 [n]). Both are -1 where an element has no source."""
    which = np.full(positions.shape, -1, np.int32)
    where = np.full(positions.shape, -1, np.int64)
    for i, move in enumerate(moves):
        inside, index = move.target.find(positions.astype(np.int64, copy=False))
        which[inside] = i
        where[inside] = move.source.at(index[inside])
    return which, where


def _run(hf: HFTensor, source: int, target: int, length: int) -> Move:
    """A contiguous stretch."""
    return Move(hf.name, Block(source, (length,), (1,)), Block(target, (length,), (1,)))


def _share(total: int, tp_size: int, what: str) -> int:
    if total % tp_size:
        raise ValueError(f"trainer.tensor_parallel={tp_size} cannot split the {total} {what}; choose a divisor of {total}")
    return total // tp_size
