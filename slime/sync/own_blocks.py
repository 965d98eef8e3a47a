"""The blocks that a rank holds some of: compared with the snapshot, listed, coded.

Blocks are numbered here by (dtype, number in the Grid), so that those of one dtype, which a launch can take, are together.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from slime.sync import wire
from slime.sync.diff import Grid
from slime.sync.kernels.diff import Diff, Listed, Stretches
from slime.sync.kernels.steps import Blocks, Steps
from slime.sync.records import BLOCK, Changes, ModelSpec

LISTED = 1 << 26  # entries that are listed at a time; every call of zstd's threads costs some 10 ms beside its work


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches that are contiguous in one of a rank's memories and in one block of an HF tensor."""

    memory: np.ndarray  # int64 [r]
    offset: np.ndarray  # int64 [r], of the first element in the memory
    tensor: np.ndarray  # int64 [r], number of the HF tensor
    source: np.ndarray  # int64 [r], position of the first element there
    count: np.ndarray  # int64 [r], elements


@dataclass(frozen=True)
class OwnBlocks:
    """What this rank holds of each block."""

    spec: ModelSpec
    diff: Diff
    number: np.ndarray  # int64 [k], in the Grid
    tensor: np.ndarray  # int64 [k]
    start: np.ndarray  # int64 [k], position of its first element in the tensor
    length: np.ndarray  # int64 [k], elements of the block, on whatever rank
    held: np.ndarray  # int64 [k], elements of it on this rank
    kind: np.ndarray  # int64 [k], equal for equal dtypes

    @classmethod
    def of(cls, spec: ModelSpec, runs: Runs, device: torch.device | str) -> "OwnBlocks":
        """`device`: where the live memories lie."""
        dtypes, grid = sorted({tensor.dtype for tensor in spec.tensors}), Grid.of(spec)
        kinds = np.array([dtypes.index(tensor.dtype) for tensor in spec.tensors], np.int64)
        widths = np.array([tensor.type.width for tensor in spec.tensors], np.int64)
        number = grid.first[runs.tensor] + runs.source // BLOCK
        order = np.lexsort((runs.source, number, kinds[runs.tensor], widths[runs.tensor]))
        memory, offset, tensor, source, count = (x[order] for x in (runs.memory, runs.offset, runs.tensor, runs.source, runs.count))
        number = number[order]
        begins = np.diff(number, prepend=-1) != 0
        first = np.flatnonzero(begins)  # run of each block
        stretches = Stretches(memory, offset, np.cumsum(begins) - 1, source % BLOCK, count)
        of_memory = np.zeros(memory.max(initial=-1) + 1, np.int64)
        of_memory[memory] = widths[tensor]
        held = np.add.reduceat(count, first) if len(first) else np.zeros(0, np.int64)
        start, mine = source[first] // BLOCK * BLOCK, tensor[first]
        return cls(spec, Diff(stretches, of_memory, device), number[first], mine, start, grid.sizes[number[first]], held, kinds[mine])

    @property
    def whole(self) -> np.ndarray:
        """bool [k]: all of the block is on this rank."""
        return self.held == self.length

    def batches(self, counts: np.ndarray) -> list[np.ndarray]:
        """The blocks in which something changed, int64 [k] of them, in lists of one dtype with at most LISTED entries or one block."""
        return self._cut(np.flatnonzero(counts), counts)

    def steps(self, batch: np.ndarray, keys: np.ndarray, table: np.ndarray) -> Steps:
        """What changed in the blocks of a batch. `keys` (uint64 [tensors]) and `table` are the fingerprints'."""
        is_float = self.spec.tensors[self.tensor[batch[0]]].type.exponent is not None
        return Steps(self.diff.entries(batch), Blocks(keys[self.tensor[batch]], self.start[batch], self.length[batch], is_float), table)

    def streams(self, steps: Steps, which: np.ndarray) -> wire.Streams:
        """Some (bool) of the blocks of a batch, coded."""
        blocks = steps.listed.blocks[which]
        found, numbers = steps.encode(which), self.start[blocks] // BLOCK
        changed, length = steps.listed.counts[which], self.length[blocks]
        return wire.Streams(self.tensor[blocks], numbers, changed, length, found.streams, found.sizes, found.two_bytes)

    def code(
        self, batches: Sequence[np.ndarray], coded: np.ndarray, keys: np.ndarray, table: np.ndarray, threads: int
    ) -> tuple[list[wire.Blocks], np.ndarray]:
        """Those of the blocks that are to be `coded` (bool [k]), and what all that changed in any of them adds to the fingerprints (uint64
        [tensors]). While zstd has one batch, on so many threads, the device lists the next."""
        sums, packed = np.zeros(len(keys), np.uint64), []
        with ThreadPoolExecutor(1) as packing:
            for batch in batches:
                steps = self.steps(batch, keys, table)
                np.add.at(sums, self.tensor[batch], steps.fingerprints())
                if coded[batch].any():
                    packed.append(packing.submit(self.streams(steps, coded[batch]).pack, threads))
            return [blocks.result() for blocks in packed], sums

    def changes(self, blocks: np.ndarray, everything: np.ndarray) -> dict[int, list[Changes]]:
        """By tensor, this rank's share of the blocks (int64 [n], ascending): what changed in them, or all (bool [n]) of their elements."""
        shares: dict[int, list[Changes]] = {}
        for all_of_it in (False, True):
            for some in self._cut(blocks[everything == all_of_it], self.held):
                for changes in self._changes(self.diff.entries(some, all_of_it)):
                    shares.setdefault(changes.tensor, []).append(changes)
        return shares

    def _cut(self, blocks: np.ndarray, entries: np.ndarray) -> list[np.ndarray]:
        """Ascending blocks in lists of one dtype with at most LISTED entries (int64 [k], of all blocks) or one block."""
        found: list[np.ndarray] = []
        for kind in np.unique(self.kind[blocks]).tolist():
            mine = blocks[self.kind[blocks] == kind]
            while len(mine):
                n = max(1, int(np.searchsorted(np.cumsum(entries[mine]), LISTED, "right")))
                found.append(mine[:n])
                mine = mine[n:]
        return found

    def _changes(self, listed: Listed) -> list[Changes]:
        positions, old, new = listed.on_host()
        where = positions + np.repeat(self.start[listed.blocks], listed.counts)
        tensors, first = np.unique(self.tensor[listed.blocks], return_index=True)
        those = [slice(low, high) for low, high in pairwise([*listed.starts[first].tolist(), len(where)])]
        return [Changes(t, where[s], old[s], new[s]) for t, s in zip(tensors.tolist(), those, strict=True) if s.stop > s.start]
