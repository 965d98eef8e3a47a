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

from slime.sync.records import ModelSpec, TensorSpec

BLOCK = 128  # rows and columns of a block
LARGEST, LEAST_PEAK = 448.0, 1e-4
MAGNITUDE = 0x7FFF  # of bfloat16: everything but the sign
QUANTISED = re.compile(r"\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


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

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the block of each flat position (int64 [n])."""
        row, column = np.divmod(positions, self.columns)
        return row // BLOCK * self.shape[1] + column // BLOCK

    def positions(self, block: int) -> np.ndarray:
        """int64 [n]: the flat positions of a block, ascending."""
        down, across = divmod(block, self.shape[1])
        rows = np.arange(down * BLOCK, min((down + 1) * BLOCK, self.rows), dtype=np.int64)
        columns = np.arange(across * BLOCK, min((across + 1) * BLOCK, self.columns), dtype=np.int64)
        return (rows[:, None] * self.columns + columns).reshape(-1)

    def peaks(self, bits: np.ndarray) -> np.ndarray:
        """uint16 [blocks]: the largest magnitude in every block, as bfloat16 bits. `bits` uint16, flat."""
        across = np.arange(0, self.columns, BLOCK)
        down = np.arange(0, self.rows, BLOCK)
        magnitudes = (bits & np.uint16(MAGNITUDE)).reshape(self.rows, self.columns)
        return np.maximum.reduceat(np.maximum.reduceat(magnitudes, down, axis=0), across, axis=1).reshape(-1)


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
    wide = scale.reshape(blocks.shape)
    for down in range(blocks.shape[0]):  # a row of blocks at a time: a scale for every element is four times the codes
        rows = slice(down * BLOCK * blocks.columns, min((down + 1) * BLOCK, blocks.rows) * blocks.columns)
        each = np.repeat(wide[down], BLOCK)[: blocks.columns]
        made[rows] = codes(bits[rows], np.broadcast_to(each, (bits[rows].size // blocks.columns, blocks.columns)).reshape(-1))
    return made, scale, peaks


def _floats(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).float()
