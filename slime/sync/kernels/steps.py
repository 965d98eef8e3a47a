"""Entries of blocks as `steps` (codec.py), and what they add to the fingerprints of their tensors.

On CUDA the entries of a block are cut into tiles of at most ENTRIES, a program each. One launch measures how long a tile's gaps, large and
raw streams are. Where each begins is then known, and a second launch writes them into one array, in the order of the wire. A tile's record:

    begin    first entry
    count    entries
    nth      entries of the block before it; a multiple of ENTRIES, so that 8 of them are a byte of signs and flags
    limit    what a gap's last byte, or two, is less than: 255 or 65535
    key      the tensor's, as int64
    start    position of the block in its tensor
    block    number among the listed
"""

from dataclasses import dataclass

import numpy as np
import torch

from slime.sync import fingerprint, kernels, native
from slime.sync.codec import GAP16_BELOW, STREAMS
from slime.sync.kernels.audit import on, upload
from slime.sync.kernels.diff import Listed

ENTRIES = 2048
WARPS = 4
TILE = 7  # int64 fields of a tile's record
GAPS, LOW, SIGNS, FLAGS, LARGE, RAW = range(STREAMS)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a Listed: all of one dtype."""

    key: np.ndarray  # uint64 [k], of the fingerprints of their tensors
    start: np.ndarray  # int64 [k], position of the first element in the tensor
    length: np.ndarray  # int64 [k], elements
    is_float: bool


@dataclass(frozen=True)
class Coded:
    """Blocks as streams, none of them through zstd yet."""

    streams: np.ndarray  # uint8, of every block in turn, in the order of codec.py
    sizes: np.ndarray  # int64 [k, STREAMS], bytes of each
    two_bytes: np.ndarray  # bool [k], whether gaps have two: steps16


class Steps:
    """The coding of `listed`, of which no block is without entries; `table` is V of the run, see fingerprint.py."""

    def __init__(self, listed: Listed, blocks: Blocks, table: np.ndarray) -> None:
        assert (listed.counts > 0).all()
        self.listed, self.blocks, self.table = listed, blocks, table
        self.two_bytes = listed.counts * GAP16_BELOW < blocks.length
        self.on_triton = kernels.on_triton(listed.old.device)
        if self.on_triton:
            self._measure()

    def fingerprints(self) -> np.ndarray:
        """uint64 [k]: what each block adds to the fingerprint of its tensor."""
        if self.on_triton:
            return self._sums.cpu().numpy().view(np.uint64)
        found, table = np.zeros(len(self.listed.blocks), np.uint64), self.table
        positions, old, new = self.listed.on_host()
        for k, (key, start) in enumerate(zip(self.blocks.key.tolist(), self.blocks.start.tolist(), strict=True)):
            those = slice(self.listed.starts[k], self.listed.starts[k + 1])
            where = positions[those].astype(np.int64) + start
            found[k] = fingerprint.moved(where, old[those], new[those], key, table)
        return found

    def encode(self, which: np.ndarray) -> Coded:
        """The streams of some of the blocks (bool [k]). Positions of a block must be of the whole block, as its one rank sees it."""
        return self._write(which) if self.on_triton else self._encode_on_host(which)

    def _encode_on_host(self, which: np.ndarray) -> Coded:
        numbers = np.flatnonzero(which)
        positions, old, new = self.listed.on_host()
        sizes, streams = np.zeros((len(numbers), STREAMS), np.int64), [np.empty(0, np.uint8)]
        for row, k in zip(sizes, numbers.tolist(), strict=True):
            those = slice(self.listed.starts[k], self.listed.starts[k + 1])
            arrays = native.steps_encode(
                self.blocks.is_float,
                2 if self.two_bytes[k] else 1,
                positions[those].astype(np.int64),
                old[those],
                new[those],
                0,
                int(self.blocks.length[k]),
            )
            row[:] = [array.nbytes for array in arrays]
            streams += [array.view(np.uint8) for array in arrays]
        return Coded(np.concatenate(streams), sizes, self.two_bytes[numbers])

    def _measure(self) -> None:
        from slime.sync.kernels import diff_programs

        listed, blocks = self.listed, self.blocks
        tiles = -(-listed.counts // ENTRIES)
        self._of = np.repeat(np.arange(len(tiles)), tiles)  # block of each tile
        self._first = np.cumsum(tiles) - tiles  # tile of each block
        nth = (np.arange(len(self._of)) - self._first[self._of]) * ENTRIES
        self._tiles = np.empty((len(self._of), TILE), np.int64)
        self._tiles[:, 0] = listed.starts[:-1][self._of] + nth
        self._tiles[:, 1] = np.minimum(listed.counts[self._of] - nth, ENTRIES)
        self._tiles[:, 2] = nth
        self._tiles[:, 3] = np.where(self.two_bytes, 65535, 255)[self._of]
        self._tiles[:, 4] = blocks.key.view(np.int64)[self._of]
        self._tiles[:, 5], self._tiles[:, 6] = blocks.start[self._of], self._of
        device = listed.old.device
        self._sizes = torch.empty((len(self._of), 3), dtype=torch.int32, device=device)
        self._sums = torch.zeros(len(tiles), dtype=torch.int64, device=device)
        if not len(self._of):
            return
        table = upload(self.table.view(np.int64), device).view(torch.uint64)
        entries = (listed.positions, listed.old, listed.new)
        with on(device):
            there = upload(self._tiles, device)
            diff_programs.measure[(len(there),)](there, *entries, table, self._sizes, self._sums, **self._constants())

    def _constants(self) -> dict[str, object]:
        from slime.sync.kernels import diff_programs

        width = self.listed.old.element_size()
        constants = {"FIELDS": TILE, "ENTRIES": ENTRIES, "TYPE": diff_programs.UNSIGNED[width], "WIDTH": width}
        return constants | {"FLOAT": self.blocks.is_float, "num_warps": WARPS}

    def _write(self, which: np.ndarray) -> Coded:
        """Streams of a block lie one after the other, those of a tile in the same order within each."""
        from slime.sync.kernels import diff_programs

        numbers, listed = np.flatnonzero(which), self.listed
        measured = self._sizes.cpu().numpy().astype(np.int64)  # [tiles, 3]
        before = np.cumsum(measured, axis=0) - measured
        before -= before[self._first][self._of]  # of the block
        totals = np.add.reduceat(measured, self._first) if len(self._first) else measured
        counts, width = listed.counts[numbers], listed.old.element_size()
        sizes = np.empty((len(numbers), STREAMS), np.int64)
        sizes[:, GAPS], sizes[:, LARGE] = totals[numbers, 0], totals[numbers, 1]
        sizes[:, LOW] = np.where(self.two_bytes[numbers], sizes[:, GAPS], 0)
        sizes[:, SIGNS] = sizes[:, FLAGS] = (counts + 7) // 8
        sizes[:, RAW] = totals[numbers, 2] * width
        begins = (np.cumsum(sizes) - sizes.reshape(-1)).reshape(sizes.shape)
        mine = which[self._of]
        row = np.cumsum(which)[self._of[mine]] - 1  # of each tile's block
        places = begins[row]
        places[:, [GAPS, LOW]] += before[mine, :1]
        places[:, [SIGNS, FLAGS]] += self._tiles[mine, 2:3] // 8
        places[:, LARGE] += before[mine, 1]
        places[:, RAW] += before[mine, 2] * width
        out = torch.full((int(sizes.sum()),), 255, dtype=torch.uint8, device=listed.old.device)
        if len(numbers):
            tiles, there = (upload(array, out.device) for array in (self._tiles[mine], places))
            entries = (listed.positions, listed.old, listed.new)
            with on(out.device):
                diff_programs.write[(len(tiles),)](tiles, there, *entries, out, STREAMS=STREAMS, **self._constants())
        return Coded(to_host(out).numpy(), sizes, self.two_bytes[numbers])


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Through page-locked memory, which torch keeps for the next call; waits."""
    if not tensor.is_cuda:
        return tensor
    there = torch.empty_like(tensor, device="cpu", pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return there
