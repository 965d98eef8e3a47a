"""What differs between two versions of a model: counted by block, put together from the ranks' shares, handed to the channel.

A block (see records.py) in which more than DENSE_AT of the elements changed is *complete*: all its elements are listed, since a dense form
is then the shorter one. Changes are counted over all ranks, so that what is listed does not depend on how the trainer divides the model.

The driver imports this file: no torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slime.sync.manifest import PartRef
from slime.sync.records import BLOCK, Changes, ModelSpec
from slime.sync.wire import DENSE_AT

if TYPE_CHECKING:
    import ray


@dataclass(frozen=True, slots=True)
class Grid:
    """The blocks of all tensors of a model, numbered through."""

    first: np.ndarray  # int64 [tensors + 1], number of each tensor's first block; then the number of blocks
    sizes: np.ndarray  # int64 [blocks], elements of each

    @classmethod
    def of(cls, spec: ModelSpec) -> "Grid":
        first = np.cumsum([0, *(tensor.blocks for tensor in spec.tensors)], dtype=np.int64)
        sizes = np.full(first[-1], BLOCK, np.int64)
        for tensor, end in zip(spec.tensors, first[1:].tolist(), strict=True):
            assert tensor.size, f"{tensor.name} has no elements"
            sizes[end - 1] = tensor.size - (tensor.blocks - 1) * BLOCK
        return cls(first, sizes)

    @property
    def blocks(self) -> int:
        return len(self.sizes)

    def complete(self, counts: np.ndarray) -> np.ndarray:
        """bool [blocks]: which ones are listed whole where int64 counts [blocks] of their elements changed."""
        return counts > DENSE_AT * self.sizes

    def by_tensor(self, counts: np.ndarray) -> np.ndarray:
        """int64 [tensors], sums of int64 counts [blocks]."""
        return np.add.reduceat(counts, self.first[:-1])


def merge(shares: Sequence[Changes]) -> Changes:
    """The changes of one tensor from disjoint shares of it, each in any order."""
    assert len({share.tensor for share in shares}) == 1, "shares of different tensors"
    positions = joined([share.positions for share in shares])
    old, new = joined([share.old for share in shares]), joined([share.new for share in shares])
    if not _ascending(positions):
        order = np.argsort(positions, kind="stable")  # which makes use of stretches that are in order, as shares have them
        positions, old, new = positions[order], old[order], new[order]
        assert _ascending(positions), f"tensor {shares[0].tensor}: two ranks list the same element"
    return Changes(shares[0].tensor, positions, old, new)


def joined(arrays: list[np.ndarray]) -> np.ndarray:
    """One after the other, without a copy where there is one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _ascending(positions: np.ndarray) -> bool:
    return bool((positions[1:] > positions[:-1]).all())


@dataclass(frozen=True, slots=True)
class Summary:
    """A publication beside its bytes; the same on every rank and, times apart, for every layout."""

    fingerprints: tuple[int, ...]  # F of every tensor at the new version
    parent_root: str  # of the fingerprints at the snapshot, see manifest.root_of
    changed: tuple[int, ...]  # elements of every tensor that differ from the snapshot
    complete_blocks: int  # listed whole
    diff_s: float  # comparing and counting; this time and the others are of the slowest rank
    exchange_s: float  # listing, and giving the ranks what they encode
    encode_s: float  # of all threads of a rank together; it overlaps with the exchange


@dataclass(frozen=True, slots=True)
class Delta:
    """A publication as the driver holds it: without its bytes, which lie in Ray's object store."""

    parts: "list[ray.ObjectRef]"  # bytes of each part, in the order of ModelSpec.parts; lost when the rank that encoded it ends
    refs: tuple[PartRef, ...]  # their names, sizes and digests
    summary: Summary
