"""Fingerprints of live memory: what `fingerprint.over_runs` computes, planned once for addresses that stay, and run after every commit.

On CUDA the runs are cut into tiles of at most Plan.tile rows of 1024 words, a program each. A tile's record is uploaded once:

    address 0x7f2a40000000   where word 0 of its first row lies, or would lie
    row     379              number of that row in the tensor: words 379 * 1024 ...
    first   0                vectors [first, end) of the tile belong to the run, counted from word 0 of that row
    end     16384            128 rows of 128 vectors of 8 words
    key     ...              the tensor's, as int64
    out     17               which sum it adds to

Rows are counted in the tensor, so V[word & 1023] is a column, wherever a run begins. What does not fill an aligned vector of 16 bytes (the
edges of a run, or all of one whose word 0 lies across 16 bytes) goes to tiles with vectors of one word.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slime.sync import fingerprint, kernels

ROW = 1024
VECTOR_BYTES = 16
TILE = 8  # int64 fields of a tile's record: address, row, first, end, key, out, and two of padding


@dataclass(frozen=True)
class Plan:
    """How the work is cut on CUDA."""

    tile: int = 128  # rows of a program
    warps: int = 4  # that share the columns of a row of 16-bit words: with 4, a thread has 8; rows of bytes take half as many


class Audit:
    """Call it for the fingerprints, as uint64 [outs], of what lies at the runs' addresses.

    `runs` is np[fingerprint.RUN], `table` the run's V, uint64 [1024]; a run adds to the sum `out` < `outs`. The memory must stay where it
    is. Calls run on the device's current stream and wait for it.
    """

    def __init__(self, runs: np.ndarray, table: np.ndarray, outs: int, device: torch.device | str, plan: Plan | None = None) -> None:
        assert table.shape == (ROW,) and np.isin(runs["size"], (1, 2)).all()
        assert not len(runs) or runs["out"].max() < outs
        self.runs, self.table, self.outs, self.device = runs[runs["words"] > 0], table, outs, torch.device(device)
        self.plan = plan or Plan()
        self.on_triton = kernels.on_triton(self.device)
        if self.on_triton:
            self._upload()

    def __call__(self) -> np.ndarray:
        if not self.on_triton:
            return fingerprint.over_runs(self.runs, self.table, self.outs)
        return self.start().cpu().numpy().view(np.uint64)

    def start(self) -> torch.Tensor:
        """Queue the work; int64 [outs] on the device, the same tensor at every call."""
        assert self.on_triton
        from slime.sync.kernels import programs

        self.sums.zero_()
        with on(self.device):
            for tiles, constants in self.work:
                programs.fingerprint[(len(tiles),)](tiles, self.table_there, self.sums, **constants)
        return self.sums

    def _upload(self) -> None:
        self.sums = torch.zeros(self.outs, dtype=torch.int64, device=self.device)
        self.table_there = upload(self.table.view(np.int64), self.device).view(torch.uint64)
        self.work: list[tuple[torch.Tensor, dict[str, Any]]] = []
        for size in (2, 1):
            wide, narrow = by_alignment(self.runs[self.runs["size"] == size])
            for part, vector in ((wide, VECTOR_BYTES // size), (narrow, 1)):
                tiles = tiles_of(part, vector, self.plan.tile)
                constants = {"FIELDS": TILE, "BYTES": size, "VECTOR": vector, "num_warps": max(1, self.plan.warps * size // 2)}
                if len(tiles):
                    self.work.append((upload(tiles, self.device), constants | {"num_stages": 1}))


def by_alignment(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of one word size as (whole aligned vectors, the rest). A vector is aligned in memory and in its row."""
    size = runs["size"].astype(np.uint64)
    vector = VECTOR_BYTES // np.maximum(size, 1)
    start, end = runs["start"], runs["start"] + runs["words"]
    first, last = -(-start.astype(np.int64) // vector.astype(np.int64)), (end // vector).astype(np.int64)
    fits = ((runs["address"] - start * size) % VECTOR_BYTES == 0) & (first < last)
    low = np.where(fits, first.astype(np.uint64) * vector, end)
    high = np.where(fits, last.astype(np.uint64) * vector, end)
    return cut(runs, low, high), np.concatenate([cut(runs, start, low), cut(runs, high, end)])


def cut(runs: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Of each run the words [low, high) of its tensor, where that is any."""
    part = runs.copy()
    part["address"] += (low - runs["start"]) * runs["size"]
    part["start"], part["words"] = low, high - low
    return part[part["words"] > 0]


def tiles_of(runs: np.ndarray, vector: int, rows: int) -> np.ndarray:
    """Records of the tiles, int64 [n, TILE]. Starts and lengths of the runs are multiples of `vector` words."""
    start, size = runs["start"].astype(np.int64), runs["size"].astype(np.int64)
    end, row = start + runs["words"].astype(np.int64), start // ROW
    counts = -(-((end - 1) // ROW - row + 1) // rows)
    of = np.repeat(np.arange(len(runs)), counts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = row[of] + nth * rows
    tiles = np.zeros((len(of), TILE), np.int64)
    tiles[:, 0] = (runs["address"].astype(np.int64) - start * size)[of] + at * ROW * size[of]
    tiles[:, 1] = at
    tiles[:, 2] = np.maximum(start[of] - at * ROW, 0) // vector
    tiles[:, 3] = np.minimum(end[of] - at * ROW, rows * ROW) // vector
    tiles[:, 4] = runs["key"].astype(np.uint64).view(np.int64)[of]
    tiles[:, 5] = runs["out"][of]
    return tiles


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).clone().to(device)


def on(device: torch.device) -> Any:
    """The device as the current one, which is where Triton launches; a thread begins with device 0."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
