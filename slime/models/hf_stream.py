"""A safetensors file that is written as its tensors come: nothing is kept in memory until the file is whole."""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
HEADER_BYTES = 128 << 10  # left free for the header, which can be written only when all tensors are known


class SafetensorsStream:
    """One file. The format wants its header first, so room is left for it, which `close` fills; the rest of the room is blanks, as the
    format allows."""

    def __init__(self, path: Path, header_bytes: int = HEADER_BYTES) -> None:
        self._file = path.open("wb")
        self._room = header_bytes
        self._file.seek(8 + header_bytes)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_size = _length(self._header)
        self.data_bytes = 0

    @property
    def names(self) -> list[str]:
        """Tensors written so far."""
        return [name for name in self._header if name != "__metadata__"]

    def takes(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for the tensor, and it would lie where its dtype may begin."""
        size = _length({name: self._entry(tensor)})
        return self._header_size + size <= self._room and self.data_bytes % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, from any device."""
        assert self.takes(name, tensor), f"no room for {name}"
        entry = self._entry(tensor)
        self._header[name] = entry
        self._header_size += _length({name: entry})
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self.data_bytes = entry["data_offsets"][1]

    def close(self) -> None:
        """Write the header."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()

    def abandon(self) -> None:
        """Let the file go as it is: without a header."""
        self._file.close()

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        end = self.data_bytes + prod(tensor.shape) * tensor.element_size()
        return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.data_bytes, end]}


def room_for(names: list[str]) -> int:
    """Bytes of a header that surely holds these tensors, a multiple of 8."""
    return 1024 + sum(256 + 2 * len(name) for name in names) // 8 * 8


def _length(entries: dict[str, Any]) -> int:
    return len(json.dumps(entries, separators=(",", ":")))
