"""Where a rank of an engine keeps the Hugging Face (HF) tensors: the record that `inserver_learn.py` makes and the host agent reads.

    Live   one storage of the model: name of the first tensor that lies in it, dtype, elements
    Move   a strided block of an HF tensor, and the block of a storage that holds the same elements in the same order

A TP rank of a small model:

    lives  0 model.embed_tokens.weight bfloat16 [8192] | 1 model.layers.0.self_attn.qkv_proj.weight bfloat16 [6144] | ...
    moves  tensor 0 (model.embed_tokens.weight), its elements 0..5119 -> live 0, 0..5119       (vocabulary rows of this rank)
           tensor 3 (model.layers.0.self_attn.k_proj.weight) 0..1023  -> live 1, 4096..5119    (fused qkv)
    live 0, 5120..8191 has no source: padding of the vocabulary

Elements of a storage that no move fills are *foreign*: padding, buffers, tensors that the model derives from others. They are hashed by
themselves and must not change unasked. An *opaque* tensor has places that are not its own elements in some order (a cast, a transpose, a
product); what they hold comes from `model.load_weights` alone. numpy and the standard library only.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from slime.layout import Block
from slime.sync.records import ELEMENT_TYPES

MOST_DIMENSIONS = 8


class MapError(ValueError):
    """A live map that cannot be: not JSON of one, or blocks outside their tensors."""


@dataclass(frozen=True, slots=True)
class Live:
    """A storage."""

    name: str
    dtype: str  # a name of ELEMENT_TYPES
    size: int  # elements

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return ELEMENT_TYPES[self.dtype].width


@dataclass(frozen=True, slots=True)
class LiveMove:
    """Elements of HF tensor number `tensor` in a storage. Strides count elements."""

    tensor: int
    source: Block
    live: int  # number of the storage in LiveMap.lives
    target: Block

    def __post_init__(self) -> None:
        assert self.source.shape == self.target.shape, self

    @property
    def stretch(self) -> int:
        """Elements that are consecutive on both sides."""
        ends = self.source.strides[-1:] == self.target.strides[-1:] == (1,)
        return self.source.shape[-1] if ends else 1

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n], int64 [n]: first source and first target position of every stretch, in the block's order."""
        index = np.arange(0, self.source.size, self.stretch, dtype=np.int64)
        return self.source.at(index), self.target.at(index)


@dataclass(frozen=True)
class LiveMap:
    """A rank's map for one ModelSpec."""

    model: str  # ModelSpec.signature
    lives: tuple[Live, ...]
    moves: tuple[LiveMove, ...]  # ascending by tensor
    opaque: Mapping[str, str]  # HF name -> why
    absent: tuple[str, ...]  # HF names that this rank does not hold
    derived: Mapping[int, tuple[int, ...]]  # storage -> storages that the model computes it from
    foreign: Mapping[int, tuple[tuple[int, int], ...]]  # storage -> [start, end) of its elements without a source, ascending

    @cached_property
    def of_tensor(self) -> dict[int, tuple[int, ...]]:
        """Numbers of the moves of each tensor that has any."""
        found: dict[int, list[int]] = {}
        for i, move in enumerate(self.moves):
            found.setdefault(move.tensor, []).append(i)
        return {tensor: tuple(moves) for tensor, moves in found.items()}

    @cached_property
    def signature(self) -> str:
        """32 hexadecimal digits: equal for equal maps."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Canonical: equal maps give equal texts."""
        record = {
            "model": self.model,
            "lives": [[live.name, live.dtype, live.size] for live in self.lives],
            "moves": [
                [m.tensor, m.live, m.source.offset, m.target.offset, list(m.source.shape), list(m.source.strides), list(m.target.strides)]
                for m in self.moves
            ],
            "opaque": dict(sorted(self.opaque.items())),
            "absent": list(self.absent),
            "derived": [[live, list(of)] for live, of in sorted(self.derived.items())],
            "foreign": [[live, [list(run) for run in runs]] for live, runs in sorted(self.foreign.items())],
        }
        return json.dumps(record, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "LiveMap":
        """What `to_json` wrote. Raises MapError for anything else, and for a block that does not lie in its storage."""
        try:
            record = json.loads(text)
            lives = tuple(Live(str(name), str(dtype), int(size)) for name, dtype, size in record["lives"])
            found = cls(
                str(record["model"]),
                lives,
                tuple(_move(entry, lives) for entry in record["moves"]),
                {str(name): str(why) for name, why in record["opaque"].items()},
                tuple(str(name) for name in record["absent"]),
                {int(live): tuple(int(i) for i in of) for live, of in record["derived"]},
                {int(live): tuple((int(a), int(b)) for a, b in runs) for live, runs in record["foreign"]},
            )
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise MapError(f"not a live map: {type(error).__name__}: {error}") from error
        if any(live.dtype not in ELEMENT_TYPES for live in lives):
            raise MapError("not a live map: a storage has a dtype that no weights have")
        return found


def _move(entry: Sequence[Any], lives: Sequence[Live]) -> LiveMove:
    tensor, live, source, target, shape, source_strides, target_strides = entry
    size = tuple(int(n) for n in shape)
    if len(size) > MOST_DIMENSIONS or not 0 <= live < len(lives) or tensor < 0:
        raise ValueError(f"move {entry}")
    move = LiveMove(
        int(tensor),
        Block(int(source), size, tuple(int(n) for n in source_strides)),
        int(live),
        Block(int(target), size, tuple(int(n) for n in target_strides)),
    )
    if move.target.end > lives[move.live].size:
        raise ValueError(f"move {entry} ends outside {lives[move.live].name}, which has {lives[move.live].size} elements")
    return move


def paired(source: tuple[int, Sequence[int]], target: tuple[int, Sequence[int]], shape: Sequence[int]) -> tuple[Block, Block] | None:
    """Two strided views of one shape, each (offset, strides), as blocks in one common order of dimensions, with dimensions that run on in
    both joined. None where there is no such order, as for a transposed copy, or where elements repeat."""
    dims = [(t, s, n) for n, s, t in zip(shape, source[1], target[1], strict=True) if n != 1]
    dims.sort(key=lambda dim: (-dim[0], -dim[1]))
    joined: list[tuple[int, int, int]] = []
    for t, s, n in dims:
        if joined and joined[-1][0] == t * n and joined[-1][1] == s * n:
            joined[-1] = (t, s, joined[-1][2] * n)
        else:
            joined.append((t, s, n))
    lengths = tuple(n for _, _, n in joined) or (1,)
    try:
        return (
            Block(source[0], lengths, tuple(s for _, s, _ in joined) or (1,)),
            Block(target[0], lengths, tuple(t for t, _, _ in joined) or (1,)),
        )
    except AssertionError:
        return None


def divided(
    source: tuple[int, Sequence[int]], target: tuple[int, Sequence[int]], shape: Sequence[int], most: int
) -> list[tuple[Block, Block]] | None:
    """`paired`, or its parts along one dimension where it takes at most `most` of them to have an order: heads that are put together in
    another order than they come in. None else."""
    pair = paired(source, target, shape)
    if pair is not None:
        return [pair]
    for axis in sorted(range(len(shape)), key=lambda axis: shape[axis]):
        if not 1 < shape[axis] <= most:
            continue
        rest = [tuple(n for i, n in enumerate(sizes) if i != axis) for sizes in (shape, source[1], target[1])]
        found = []
        for i in range(shape[axis]):
            pair = paired((source[0] + i * source[1][axis], rest[1]), (target[0] + i * target[1][axis], rest[2]), rest[0])
            if pair is None or pair[0].strides[-1] != 1 or pair[1].strides[-1] != 1:
                break
            found.append(pair)
        else:
            return found
    return None


def complement(size: int, starts: np.ndarray, ends: np.ndarray) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The runs [start, end) of 0..size that the runs `starts`, `ends` (int64 [n]) leave out, and whether two of those overlap."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(np.append(0, ends))
    gaps = np.append(starts, size)
    open_at = np.flatnonzero(gaps > reach)
    return tuple(zip(reach[open_at].tolist(), gaps[open_at].tolist(), strict=True)), bool((starts < reach[:-1]).any())
