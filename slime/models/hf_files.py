"""Hugging Face checkpoints on disk: safetensors in by slices, sharded safetensors out."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from slime.layout import Block, Shape
from slime.models.hf_headers import INDEX, SINGLE, HFHeaders, open_safetensors
from slime.models.hf_stream import SafetensorsStream

WINDOW_BYTES = 64 << 20  # read from mapped files before they are mapped anew
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What belongs to a model beside its weights and config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class HFReader(HFHeaders):
    """A checkpoint whose tensors can be read; a slice reads its own bytes only.

    Files are mapped into memory, and what was read of them counts as the process's own until they are unmapped: that is done every
    WINDOW_BYTES, so that a file of any size is read in little memory. A tensor that is returned may be a view of a mapped file: copy what
    is to stay.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._files: dict[str, Any] = {}  # those that are mapped
        self._read_bytes = 0  # through them

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the file's header."""
        return DTYPES[self._entry(name).dtype]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU, in the file's dtype."""
        return self._slice(name, prod(self.shape(name)))[...]  # not [:], which a tensor without dimensions refuses

    def read_block(self, name: str, block: Block) -> torch.Tensor:
        """The elements of a block (a `Move.source`), shape block.shape, on the CPU. Reads the rows that the block touches, and of a block
        of columns only those."""
        width = prod(self.shape(name)[1:])
        first, last = block.offset // width, (block.end - 1) // width
        part = self._slice(name, (last + 1 - first) * width)
        if len(self.shape(name)) == 2 and block.strides == (width, 1):
            left = block.offset % width
            return part[first : last + 1, left : left + block.shape[1]]
        rows = part[first : last + 1].reshape(-1)
        return rows.as_strided(block.shape, block.strides, rows.storage_offset() + block.offset - first * width)

    def close(self) -> None:
        """Lets the files go; nothing can be read afterwards."""
        super().close()
        self._files = {}

    def _slice(self, name: str, elements: int) -> Any:
        """safetensors' handle of a tensor, of which that many elements will be read."""
        file, size = self._entry(name).file, elements * self.dtype(name).itemsize
        if self._read_bytes + size > WINDOW_BYTES:
            self._files, self._read_bytes = {}, 0
        if file not in self._files:
            self._files[file] = open_safetensors(self.path / file, "pt")
        self._read_bytes += size
        return self._files[file].get_slice(name)


class HFWriter:
    """Writes a checkpoint directory: safetensors of at most `max_shard_bytes` (a larger tensor gets a file of its own) with their index,
    config.json, tokenizer, generation config and chat template of `source`.

    Files are written into a hidden folder of the directory and given their names in `close`, config.json last: a directory that has a
    config.json holds a whole model, also where an earlier export is replaced. A tensor goes to its file at once, so that memory
    holds one at a time. As a context manager it closes on success and discards what was written on an exception.
    """

    def __init__(
        self, path: str | Path, source: str | Path, shapes: Mapping[str, Shape] | None = None, max_shard_bytes: int = 4 << 30
    ) -> None:
        """`source` is the directory the model came from; `shapes` (ModelMap.hf_shapes), if given, is what has to be written. Raises
        ValueError where source has no config.json or is the directory to write."""
        self.path, self.source = Path(path), Path(source)
        if not (self.source / "config.json").is_file():
            raise ValueError(f"{self.source / 'config.json'}: missing; an export takes config.json and tokenizer from there")
        if self.path.resolve() == self.source.resolve():
            raise ValueError(f"{self.path}: an export cannot overwrite the model it came from; write to another directory")
        self._folder = self.path / ".export"
        self._stream: SafetensorsStream | None = None
        self.discard()
        self._folder.mkdir(parents=True)
        self._expected = shapes
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[list[str]] = []  # tensor names of each file that is closed
        self._written: set[str] = set()
        self._parameters: Counter[torch.dtype] = Counter()
        self._total_bytes = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, from any device; tensors go to files in the order they come."""
        assert self._expected is None or self._expected.get(name) == tuple(tensor.shape), (name, tuple(tensor.shape))
        assert name not in self._written, f"{name} is written twice"
        size = tensor.numel() * tensor.element_size()
        if self._stream is not None:
            full = self._stream.data_bytes + size > self._max_shard_bytes
            if full or not self._stream.takes(name, tensor):
                self._end_file()
        if self._stream is None:
            self._stream = SafetensorsStream(self._folder / f"shard-{len(self._shards)}")
        self._stream.add(name, tensor)
        self._written.add(name)
        self._total_bytes += size
        self._parameters[tensor.dtype] += tensor.numel()

    def close(self) -> None:
        """Ends the last file, then gives every file its name."""
        self._end_file()
        missing = [name for name in self._expected or () if name not in self._written]
        assert not missing, f"export to {self.path} lacks {missing[:4]}"
        self._name_shards()
        for name in COMPANIONS:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, self._folder / name)
        self._config()
        self._publish()

    def discard(self) -> None:
        """Removes what was written and not published."""
        if self._stream is not None:
            self._stream.abandon()
            self._stream = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "HFWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def _end_file(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._shards.append(self._stream.names)
            self._stream = None

    def _name_shards(self) -> None:
        """Final names, which hold the number of files, and the index of several; one file needs none."""
        count = len(self._shards)
        files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, file in enumerate(files):
            (self._folder / f"shard-{number}").rename(self._folder / file)
        if count > 1:
            places = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            metadata = {"total_size": self._total_bytes, "total_parameters": self._parameters.total()}
            self._json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})

    def _config(self) -> None:
        """config.json of the source with the dtype that was written (most of all: routers keep a bias in fp32), which decides what readers
        load the weights as."""
        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        for dtype, _ in self._parameters.most_common(1):
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
        self._json("config.json", config)

    def _json(self, name: str, values: dict[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _publish(self) -> None:
        """Makes the files durable, removes an earlier model, config.json first, and moves the files to their place, config.json last."""
        for file in self._folder.iterdir():
            _sync(file)
        for old in (
            self.path / "config.json",
            self.path / INDEX,
            *self.path.glob("model*.safetensors"),
            *(self.path / c for c in COMPANIONS),
        ):
            old.unlink(missing_ok=True)
        for file in sorted(self._folder.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, self.path / file.name)
        self._folder.rmdir()
        _sync(self.path)


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
