"""What others send for the same change of weights, as far as measuring needs it.

An encoding of one tensor is a `Way`: `encode` makes bytes of its old and new bits, `decode` writes the new ones over a copy of the old.
`load` is a custom weight loader of SGLang that applies what a rival's engine applies, from a file of this host's memory:

    coo:<folder>      positions and values of every tensor: a whole tensor full of NaN with the values in their places goes through
                      model.load_weights, which copies what is not NaN (verl's and vLLM's way: all elements are written and read)
    whole:<folder>    whole tensors through model.load_weights, as they lie in memory
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from slime.sync import native

LOADER = "benchmarks.rivals.load"


class Way:
    """An encoding of one tensor, of uint16 bits [n]."""

    def __init__(self, old: np.ndarray, new: np.ndarray) -> None:
        self.old, self.new = old, new

    def encode(self) -> list[bytes]:
        raise AssertionError

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        raise AssertionError


class Full(Way):
    def encode(self) -> list[bytes]:
        return [self.new.tobytes()]

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        bits[:] = np.frombuffer(wire[0], np.uint16)


class Xor(Way):
    def encode(self) -> list[bytes]:
        return [zstandard.ZstdCompressor(level=1).compress((self.old ^ self.new).view(np.uint8).data)]

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        np.bitwise_xor(bits, np.frombuffer(zstandard.ZstdDecompressor().decompress(wire[0]), np.uint16), out=bits)


class Coo(Way):
    def encode(self) -> list[bytes]:
        positions = native.diff(self.old, self.new)
        return [positions.astype(np.uint32).tobytes(), self.new[positions].tobytes()]

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        bits[np.frombuffer(wire[0], np.uint32)] = np.frombuffer(wire[1], np.uint16)


class Gap16(Way):
    def encode(self) -> list[bytes]:
        positions = native.diff(self.old, self.new)
        gaps = np.diff(positions, prepend=-1)
        if gaps.max(initial=0) > 65535:  # 0: gaps of 32 bits, as NeMo-RL does
            gaps, mark = gaps.astype(np.uint32), b"4"
        else:
            gaps, mark = gaps.astype(np.uint16), b"2"
        pack = zstandard.ZstdCompressor(level=1).compress
        return [mark, pack(gaps.tobytes()), pack((self.old[positions] ^ self.new[positions]).tobytes())]

    def decode(self, wire: list[bytes], bits: np.ndarray) -> None:
        unpack = zstandard.ZstdDecompressor().decompress
        positions = np.cumsum(np.frombuffer(unpack(wire[1]), f"<u{wire[0].decode()}"), dtype=np.int64) - 1
        bits[positions] ^= np.frombuffer(unpack(wire[2]), np.uint16)


# ---- inside SGLang ----


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's hook; an update is one empty tensor whose name says what to do."""
    what, _, folder = next(iter(named_tensors))[0].partition(":")
    with torch.no_grad():
        APPLY[what](model, Path(folder))


def load_coo(model: Any, folder: Path) -> None:
    with copying_what_is_not_nan():
        model.load_weights(spread(folder))


def spread(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole bf16 tensors, NaN but for the values that came."""
    positions, values = np.load(folder / "positions.npy", mmap_mode="r"), np.load(folder / "values.npy", mmap_mode="r")
    at = 0
    for line in (folder / "tensors").read_text().splitlines():
        name, count, *shape = line.split()
        end = at + int(count)
        dense = torch.full([int(n) for n in shape], float("nan"), dtype=torch.bfloat16)
        index = torch.from_numpy(positions[at:end].astype(np.int64))
        dense.view(-1).view(torch.int16)[index] = torch.from_numpy(values[at:end].view(np.int16).copy())
        yield name, dense
        at = end


@contextmanager
def copying_what_is_not_nan() -> Iterator[None]:
    """`Tensor.copy_` leaves elements alone whose source is NaN."""
    copy = torch.Tensor.copy_

    def masked(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return copy(target, torch.where(torch.isnan(source), target, source))

    torch.Tensor.copy_ = masked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]


def load_whole(model: Any, folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt", device="cpu") as file:
        model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


APPLY: dict[str, Callable[[Any, Path], None]] = {"coo": load_coo, "whole": load_whole}
