"""What the rooms of the weight channel hand to one another: element types, the tensors of a model, what changed in one of them.

Weights are handled as bits: an array of unsigned integers as wide as the element, so that NaN payloads, -0.0 and subnormals are values
like any other. A model is its Hugging Face (HF) tensors in one fixed order, the model map's; a tensor is named by its number there, an
element by its flat position in the HF tensor. Neither depends on how trainer or engine divide the tensor.

    ModelSpec.tensors   0 model.embed_tokens.weight [128, 64] bfloat16 | 1 model.layers.0.input_layernorm.weight [64] bfloat16 | ...
    Changes(tensor=0, positions=[7, 4711], old=[0x3f80, 0x0000], new=[0x3f81, 0x8000])   element 7: 1.0 -> 1.0078125, 4711: 0.0 -> -0.0

numpy and the standard library only: `inserver.py` reads these records inside SGLang.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

BLOCK = 1 << 20  # elements of a tensor that the codec treats as one; the last block of a tensor is shorter


@dataclass(frozen=True, slots=True)
class ElementType:
    """A dtype as bits. `name` is torch's, without `torch.`."""

    name: str
    width: int  # bytes: 1, 2, 4 or 8
    exponent: tuple[int, int] | None = None  # (lowest bit, number of bits) of a float's exponent; None for integers

    @property
    def bits(self) -> np.dtype:
        """The unsigned integer that holds an element."""
        return np.dtype(f"<u{self.width}")


ELEMENT_TYPES = {
    t.name: t
    for t in (
        ElementType("bfloat16", 2, (7, 8)),
        ElementType("float16", 2, (10, 5)),
        ElementType("float32", 4, (23, 8)),
        ElementType("float64", 8, (52, 11)),
        ElementType("float8_e4m3fn", 1, (3, 4)),
        ElementType("float8_e5m2", 1, (2, 5)),
        ElementType("int8", 1),
        ElementType("uint8", 1),
        ElementType("bool", 1),
        ElementType("int16", 2),
        ElementType("int32", 4),
        ElementType("int64", 8),
    )
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An HF tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a name of ELEMENT_TYPES

    @property
    def type(self) -> ElementType:
        return ELEMENT_TYPES[self.dtype]

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.type.width

    @property
    def blocks(self) -> int:
        """Blocks of at most BLOCK elements."""
        return -(-self.size // BLOCK)


@dataclass(frozen=True)
class ModelSpec:
    """The tensors that travel, in their order. Tied tensors are listed once."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each tensor, by name."""
        return {tensor.name: i for i, tensor in enumerate(self.tensors)}

    @cached_property
    def signature(self) -> str:
        """32 hexadecimal digits: equal for equal names, shapes, dtypes and order."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def parts(self, part_bytes: int) -> tuple[range, ...]:
        """The tensors divided into runs of at most `part_bytes` of weights, or of one tensor: what is encoded and decoded at a time."""
        parts: list[range] = []
        room = 0
        for i, tensor in enumerate(self.tensors):
            if tensor.nbytes > room or not parts:
                parts.append(range(i, i))
                room = part_bytes
            parts[-1] = range(parts[-1].start, i + 1)
            room -= tensor.nbytes
        return tuple(parts)

    def to_json(self) -> str:
        """Canonical: equal models give equal texts."""
        return json.dumps([[t.name, list(t.shape), t.dtype] for t in self.tensors], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """What `to_json` wrote. Raises ValueError for anything else, a dtype of no ELEMENT_TYPES and a name that comes twice."""
        try:
            tensors = tuple(TensorSpec(str(name), tuple(int(n) for n in shape), str(dtype)) for name, shape, dtype in json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not the tensors of a model: {error}") from error
        for tensor in tensors:
            if tensor.dtype not in ELEMENT_TYPES or min(tensor.shape, default=0) < 0:
                raise ValueError(f"tensor {tensor.name} has dtype {tensor.dtype} and shape {tensor.shape}, which no weights have")
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise ValueError("a tensor comes twice")
        return cls(tensors)


@dataclass(slots=True)
class Changes:
    """What is different in one tensor between two versions. A block whose elements are all listed, unchanged ones included, is complete:
    its old bits are not needed to restore it."""

    tensor: int  # number in the ModelSpec
    positions: np.ndarray  # int64 [n], ascending, each once
    old: np.ndarray  # bits [n]
    new: np.ndarray  # bits [n]

    def __len__(self) -> int:
        return len(self.positions)

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """(number of the block, its entries) for every block that has any."""
        if not len(self.positions):
            return
        of = self.positions // BLOCK
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        ends = np.append(starts[1:], len(of))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield int(of[start]), slice(start, end)
