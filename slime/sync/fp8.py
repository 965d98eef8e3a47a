"""FP8 engines: the matrices of a model as SGLang serves them block-quantised, e4m3 codes and a float32 scale for every 128 x 128 block.

A checkpoint of this kind names them as DeepSeek-V3's does:

    model.layers.0.mlp.down_proj.weight            [2560, 9728] float8_e4m3fn   codes
    model.layers.0.mlp.down_proj.weight_scale_inv  [20, 76]     float32         value = code x scale

The rule is that of SGLang's `per_block_cast_to_fp8` (layers/quantization/fp8_utils.py, from DeepGEMM), with the scale as it is, not rounded
up to a power of two:

    peak  = largest magnitude of the block           scale = max(peak, 1e-4) / 448           code = e4m3(value x (1 / scale))

in float32, e4m3 by rounding to nearest, ties to even. It looks at one block alone, so a version that changes few elements changes few
codes: at most those of the elements that changed, and of the blocks whose peak changed.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch

from slime.config.check_fp8 import BLOCK
from slime.sync.records import ModelSpec, TensorSpec

SHIFT = 7  # log2 of it
ANEW = 0.2  # share of a matrix's elements from which on it is quicker to quantise all of it
LARGEST, LEAST_PEAK = 448.0, 1e-4
MAGNITUDE = 0x7FFF  # of bfloat16: everything but the sign
QUANTISED = re.compile(r"\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")


def is_quantised(tensor: TensorSpec) -> bool:
    """Whether FP8 engines hold this tensor as codes: projections of attention and of MLPs, experts included. Embeddings, heads, norms and
    routers stay as they are."""
    return len(tensor.shape) == 2 and QUANTISED.search(tensor.name) is not None


def served(spec: ModelSpec) -> ModelSpec:
    """The tensors of an FP8 checkpoint of this model; scales follow their codes. Raises ValueError for matrices that are not bfloat16."""
    found = []
    for tensor in spec.tensors:
        if not is_quantised(tensor):
            found.append(tensor)
            continue
        if tensor.dtype != "bfloat16":
            raise ValueError(f"rollout.quantization=fp8: {tensor.name} is {tensor.dtype}, not bfloat16: set model.dtype=bf16")
        found.append(TensorSpec(tensor.name, tensor.shape, "float8_e4m3fn"))
        found.append(TensorSpec(f"{tensor.name}_scale_inv", Blocks.of(tensor.shape).shape, "float32"))
    return ModelSpec(tuple(found))


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a matrix, numbered row by row; those at the edges may be smaller."""

    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Blocks":
        rows, columns = shape
        return cls(rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return -(-self.rows // BLOCK), -(-self.columns // BLOCK)

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n], int64 [n]: the block of each flat position (int64 [n]), and its place in it, row by row of a whole block."""
        row = positions // self.columns
        column = positions - row * self.columns
        return (row >> SHIFT) * self.shape[1] + (column >> SHIFT), (row & BLOCK - 1) << SHIFT | column & BLOCK - 1

    def joined(self, block: np.ndarray, place: np.ndarray) -> np.ndarray:
        """int64 [n]: the flat positions of places (int64 [n]) in blocks (int64 [n]), as `split` gives them."""
        down, across = np.divmod(block, self.shape[1])
        row, column = np.divmod(place, BLOCK)
        return (down * BLOCK + row) * self.columns + across * BLOCK + column

    def gather(self, flat: np.ndarray, which: np.ndarray) -> np.ndarray:
        """[k, 128 x 128]: elements of blocks `which` (int64 [k]), 0 beyond the edges. `flat`: those of the matrix."""
        wide = flat.reshape(self.rows, self.columns)
        made = np.zeros((len(which), BLOCK, BLOCK), flat.dtype)
        for into, block in zip(made, which.tolist(), strict=True):
            down, across = (n * BLOCK for n in divmod(block, self.shape[1]))
            found = wide[down : down + BLOCK, across : across + BLOCK]
            into[: found.shape[0], : found.shape[1]] = found
        return made.reshape(len(which), BLOCK * BLOCK)

    def inside(self, which: np.ndarray) -> np.ndarray:
        """bool [k, 128 x 128]: whether the places of blocks `which` (int64 [k]) lie in the matrix."""
        down, across = (BLOCK * n[:, None] + np.arange(BLOCK) for n in np.divmod(which, self.shape[1]))
        return ((down < self.rows)[:, :, None] & (across < self.columns)[:, None, :]).reshape(len(which), BLOCK * BLOCK)

    def peaks(self, bits: np.ndarray) -> np.ndarray:
        """uint16 [blocks]: the largest magnitude in every block, as bfloat16 bits. `bits` uint16, flat."""
        across = np.arange(0, self.columns, BLOCK)
        found = np.empty(self.shape, np.uint16)
        for band, into in zip(self.bands(bits), found, strict=True):
            np.maximum.reduceat((band & np.uint16(MAGNITUDE)).max(0), across, out=into)
        return found.reshape(-1)

    def bands(self, flat: np.ndarray) -> list[np.ndarray]:
        """[up to 128, columns]: the rows of blocks; views. `flat`: elements of the matrix."""
        wide = flat.reshape(self.rows, self.columns)
        return [wide[row : row + BLOCK] for row in range(0, self.rows, BLOCK)]


def scales(peaks: np.ndarray) -> np.ndarray:
    """float32 [n]: scales of blocks with these peaks (bfloat16 bits)."""
    return (_floats(peaks).clamp(LEAST_PEAK) / LARGEST).numpy()


def codes(bits: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """uint8 [n]: codes of values (bfloat16 bits [n]) with the scale of their block (float32 [n])."""
    return (_floats(bits) * (1.0 / torch.from_numpy(scale))).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def quantise(bits: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [elements], float32 [blocks], uint16 [blocks]: codes, scales and peaks of a matrix (bfloat16 bits, flat)."""
    peaks = blocks.peaks(bits)
    scale = scales(peaks)
    made = np.empty(bits.size, np.uint8)
    inverse = (1.0 / torch.from_numpy(scale)).reshape(blocks.shape).repeat_interleave(BLOCK, 1)[:, : blocks.columns]
    for band, into, factors in zip(blocks.bands(bits), blocks.bands(made), inverse, strict=True):
        into[:] = (_floats(band) * factors).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return made, scale, peaks


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantised matrix: bfloat16 bits (uint16) and codes (uint8), flat; the peak of every block (uint16)."""

    blocks: Blocks
    bits: np.ndarray
    codes: np.ndarray
    peaks: np.ndarray

    def after(self, positions: np.ndarray, old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [m], uint8 [m], uint16 [blocks]: positions whose code is another, ascending, those codes, and the peaks, when elements at
        `positions` (int64 [n], ascending) turn from bits `old` into `new` (uint16 [n]). Nothing is changed.

        Whole blocks are looked at only where the peak has grown, or an element that had it has shrunk.
        """
        if len(positions) > ANEW * len(self.bits):
            return self._anew(positions, new)
        block, place = self.blocks.split(positions)
        peaks, again = self._grown(block, old, new)
        which, inside = np.flatnonzero(again), again[block]
        held = self.blocks.gather(self.bits, which)
        held[(np.cumsum(again) - 1)[block[inside]], place[inside]] = new[inside]
        if len(which):
            peaks[which] = (held & np.uint16(MAGNITUDE)).max(1)
        scale = scales(peaks)
        whole = codes(held.reshape(-1), np.repeat(scale[which], BLOCK * BLOCK)).reshape(held.shape)
        there, at = np.nonzero((whole != self.blocks.gather(self.codes, which)) & self.blocks.inside(which))
        outside = np.flatnonzero(~inside)
        single = codes(new[outside], scale[block[outside]])
        other = np.flatnonzero(single != self.codes[positions[outside]])
        found = np.concatenate([positions[outside[other]], self.blocks.joined(which[there], at)])
        order = np.argsort(found, kind="stable")
        return found[order], np.concatenate([single[other], whole[there, at]])[order], peaks

    def _anew(self, positions: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same by way of the whole matrix."""
        bits = self.bits.copy()
        bits[positions] = new
        made, _, peaks = quantise(bits, self.blocks)
        found = np.flatnonzero(made != self.codes)
        return found, made[found], peaks

    def _grown(self, block: np.ndarray, old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint16 [blocks], bool [blocks]: peaks, at most too high; and of which blocks they have to be found anew."""
        was, becomes = old & np.uint16(MAGNITUDE), new & np.uint16(MAGNITUDE)
        peak, peaks = self.peaks[block], self.peaks.copy()
        grown = np.flatnonzero(becomes > peak)
        np.maximum.at(peaks, block[grown], becomes[grown])
        again = peaks != self.peaks
        again[block[np.flatnonzero((was == peak) & (becomes < was))]] = True
        return peaks, again


def _floats(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float()
