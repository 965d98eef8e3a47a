"""The blocks that a rank holds some of: compared with the snapshot, listed, coded.

Blocks are numbered here by (dtype, number in the Grid), so that those of one dtype, which a launch can take, are together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from slime.sync import wire
from slime.sync.diff import Grid
from slime.sync.kernels.diff import Diff, Listed, Stretches
from slime.sync.kernels.steps import Blocks, Steps
from slime.sync.records import BLOCK, Changes, ModelSpec
from slime.trainer.publish_slices import Piece

LISTED = 1 << 26  # entries that are listed at a time


@dataclass(frozen=True)
class OwnBlocks:
    """What this rank holds of each block."""

    spec: ModelSpec
    diff: Diff  # memories are the pieces
    number: np.ndarray  # int64 [k], in the Grid
    tensor: np.ndarray  # int64 [k]
    start: np.ndarray  # int64 [k], position of its first element in the tensor
    length: np.ndarray  # int64 [k], elements of the block, on whatever rank
    held: np.ndarray  # int64 [k], elements of it on this rank
    kind: np.ndarray  # int64 [k], equal for equal dtypes

    @classmethod
    def of(cls, spec: ModelSpec, grid: Grid, pieces: Sequence[Piece], device: torch.device) -> "OwnBlocks":
        dtypes = sorted({tensor.dtype for tensor in spec.tensors})
        kinds = np.array([dtypes.index(tensor.dtype) for tensor in spec.tensors], np.int64)
        widths = np.array([tensor.type.width for tensor in spec.tensors], np.int64)
        memory, offset, tensor, source, count = _runs(pieces)
        number = grid.first[tensor] + source // BLOCK
        order = np.lexsort((source, number, kinds[tensor], widths[tensor]))
        memory, offset, tensor, source, count, number = (x[order] for x in (memory, offset, tensor, source, count, number))
        first = np.flatnonzero(np.diff(number, prepend=-1))  # stretch of each block
        block = np.cumsum(np.diff(number, prepend=-1) != 0) - 1
        stretches = Stretches(memory, offset, block, source % BLOCK, count)
        of_piece = np.array([widths[piece.tensors[0]] for piece in pieces], np.int64)
        held = np.add.reduceat(count, first) if len(first) else np.zeros(0, np.int64)
        mine = tensor[first]
        start = source[first] // BLOCK * BLOCK
        return cls(spec, Diff(stretches, of_piece, device), number[first], mine, start, grid.sizes[number[first]], held, kinds[mine])

    @property
    def whole(self) -> np.ndarray:
        """bool [k]: all of the block is on this rank."""
        return self.held == self.length

    def batches(self, counts: np.ndarray) -> list[np.ndarray]:
        """The blocks in which something changed, int64 [k] of them, in lists of one dtype with at most LISTED entries or one block."""
        found: list[np.ndarray] = []
        changed = np.flatnonzero(counts)
        for kind in np.unique(self.kind[changed]).tolist():
            mine = changed[self.kind[changed] == kind]
            while len(mine):
                n = max(1, int(np.searchsorted(np.cumsum(counts[mine]), LISTED, "right")))
                found.append(mine[:n])
                mine = mine[n:]
        return found

    def steps(self, batch: np.ndarray, keys: np.ndarray, table: np.ndarray) -> Steps:
        """What changed in the blocks of a batch. `keys` (uint64 [tensors]) and `table` are the fingerprints'."""
        is_float = self.spec.tensors[self.tensor[batch[0]]].type.exponent is not None
        return Steps(self.diff.list(batch), Blocks(keys[self.tensor[batch]], self.start[batch], self.length[batch], is_float), table)

    def coded(self, steps: Steps, which: np.ndarray, threads: int) -> wire.Blocks:
        """Some (bool) of the blocks of a batch, as they travel."""
        blocks = steps.listed.blocks[which]
        found, changed = steps.encode(which), steps.listed.counts[which]
        places = self.start[blocks] // BLOCK
        return wire.packed(self.tensor[blocks], places, changed, found.streams, found.sizes, found.two_bytes, threads)

    def changes(self, blocks: np.ndarray, everything: np.ndarray) -> dict[int, list[Changes]]:
        """By tensor, this rank's share of the blocks (int64 [n], ascending): what changed in them, or all (bool [n]) of their elements."""
        shares: dict[int, list[Changes]] = {}
        for kind in np.unique(self.kind[blocks]).tolist():
            for all_of_it in (False, True):
                mine = blocks[(self.kind[blocks] == kind) & (everything == all_of_it)]
                if len(mine):
                    for changes in self._changes(self.diff.list(mine, all_of_it)):
                        shares.setdefault(changes.tensor, []).append(changes)
        return shares

    def _changes(self, listed: Listed) -> list[Changes]:
        positions, old, new = listed.on_host()
        where = positions + np.repeat(self.start[listed.blocks], listed.counts)
        tensors, first = np.unique(self.tensor[listed.blocks], return_index=True)
        those = [slice(low, high) for low, high in pairwise([*listed.starts[first].tolist(), len(where)])]
        return [Changes(t, where[s], old[s], new[s]) for t, s in zip(tensors.tolist(), those, strict=True) if s.stop > s.start]


def _runs(pieces: Sequence[Piece]) -> tuple[np.ndarray, ...]:
    """Of all runs of all pieces: piece, offset in it, HF tensor, position there, elements; int64 [n] each."""
    columns = [
        np.stack([np.full_like(p.runs.source, n), p.runs.target - p.start, p.runs.tensor, p.runs.source, p.runs.length])
        for n, p in enumerate(pieces)
    ]
    return tuple(np.concatenate([np.zeros((5, 0), np.int64), *columns], axis=1))
