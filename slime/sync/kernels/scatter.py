"""Entries of one width between staged arrays and live weights: in place, at addresses, any number of tensors in one launch.

On CUDA segments are cut into tiles of at most ENTRIES entries, a program each, whose records are uploaded once: address, first entry in
`bits`, first entry in `index`, entries, whether they lie one after another.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from slime.sync import kernels, native
from slime.sync.kernels.audit import on, upload

TILE = 5  # int64 fields of a tile's record
ENTRIES = 2048
WARPS = 4
WIDTHS = {torch.uint8: 1, torch.int16: 2, torch.int32: 4, torch.int64: 8}  # bytes of an element, by the dtype of `bits`


class Scatter:
    """Moves `bits` [n] (uint8, int16, int32 or int64) to and from the live memory that `segments` name.

    `segments` is np[staging.SEGMENT], all of the width of `bits`; `index` is int32 [m], whose bits are unsigned element positions within
    segments. Both tensors lie on `device`. Live memory must stay where it is, and no place may come twice. Calls are queued on the device's
    current stream.
    """

    def __init__(self, segments: np.ndarray, index: torch.Tensor, bits: torch.Tensor, device: torch.device | str) -> None:
        self.segments, self.index, self.bits, self.device = segments, index, bits, torch.device(device)
        listed = segments[segments["run"] == 0]
        assert index.dtype == torch.int32 and index.is_contiguous() and bits.is_contiguous(), (index.dtype, bits.dtype)
        assert (segments["width"] == WIDTHS[bits.dtype]).all(), bits.dtype
        assert not len(segments) or (segments["first"] + segments["count"]).max() <= len(bits), "segments reach beyond the bits"
        assert not len(listed) or (listed["at"] + listed["count"]).max() <= len(index), "segments reach beyond the index"
        self.on_triton = kernels.on_triton(self.device)
        if self.on_triton:
            compile_for(self.device, bits.dtype)
            self.tiles = upload(tiles_of(segments), self.device)

    def write(self) -> None:
        """bits -> live."""
        if self.on_triton:
            self._launch("scatter", self.bits)
        else:
            native.scatter(self.segments, unsigned(self.index), unsigned(self.bits))

    def read(self) -> torch.Tensor:
        """live -> a new tensor like `bits`; zero where an entry belongs to no segment."""
        found = torch.zeros_like(self.bits)
        if self.on_triton:
            self._launch("gather", found)
        else:
            native.gather(self.segments, unsigned(self.index), unsigned(found))
        return found

    def _launch(self, name: str, bits: torch.Tensor) -> None:
        if len(self.tiles):
            launch(name, self.tiles, self.index, bits)


def launch(name: str, tiles: torch.Tensor, index: torch.Tensor, bits: torch.Tensor) -> None:
    from slime.sync.kernels import programs

    program: Any = getattr(programs, name)
    with on(bits.device):
        program[(len(tiles),)](tiles, index, bits, FIELDS=TILE, ENTRIES=ENTRIES, num_warps=WARPS)


@cache
def compile_for(device: torch.device, dtype: torch.dtype) -> None:
    """Have both programs compiled and loaded, by a tile without entries. A first `write` may come while an engine is paused."""
    tiles, index = torch.zeros((1, TILE), dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    for name in ("scatter", "gather"):
        launch(name, tiles, index, torch.zeros(1, dtype=dtype, device=device))


def tiles_of(segments: np.ndarray) -> np.ndarray:
    """Records of the tiles, int64 [n, TILE]."""
    count = segments["count"].astype(np.int64)
    counts = -(-count // ENTRIES)
    of = np.repeat(np.arange(len(segments)), counts)
    begin = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * ENTRIES
    run = (segments["run"] != 0)[of]
    tiles = np.zeros((len(of), TILE), np.int64)
    tiles[:, 0] = segments["address"].astype(np.int64)[of] + np.where(run, begin * segments["width"].astype(np.int64)[of], 0)
    tiles[:, 1] = segments["first"].astype(np.int64)[of] + begin
    tiles[:, 2] = np.where(run, 0, segments["at"].astype(np.int64)[of] + begin)
    tiles[:, 3] = np.minimum(count[of] - begin, ENTRIES)
    tiles[:, 4] = run
    return tiles


def unsigned(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as unsigned integers."""
    array = tensor.numpy()
    return array.view(np.dtype(f"u{array.itemsize}"))
