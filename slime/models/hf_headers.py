"""The headers of a Hugging Face checkpoint's safetensors: names, shapes and dtypes of its tensors. Needs no torch, which takes seconds to
import.

An index and the headers of its files are read once in a process, however many readers there are, and again where a file has changed."""

import json
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from safetensors import SafetensorError, safe_open

from slime.layout import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TRAINABLE = ("F32", "BF16", "F16")
Stamp = tuple[int, int, int]  # inode, time of change in ns, bytes: what tells a file from one that replaced it


class Entry(NamedTuple):
    """A tensor as a header tells of it."""

    file: str
    dtype: str
    shape: Shape


class HFHeaders:
    """The tensors of a checkpoint directory: model.safetensors, or the shards of model.safetensors.index.json. Use as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Reads the headers. Raises ValueError naming the place: no safetensors, a shard or tensor that the index names but that is not
        there, a file that is not safetensors, a dtype other than float32, bfloat16 and float16."""
        self.path = Path(path)
        self._entries: dict[str, Entry] = {}
        for file, names in self._listing().items():
            held = _header(self.path / file, self._stamp(file))
            for name in sorted(held) if names is None else names:
                if name not in held:
                    raise ValueError(f"{self.path / INDEX}: places {name} in {file}, which does not hold it; download the model again")
                self._entries[name] = self._checked(Entry(file, *held[name]), name)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the file's header. Raises ValueError for a name that is not there; so do the other methods."""
        return self._entry(name).shape

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._entries = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _listing(self) -> dict[str, list[str] | None]:
        """Files to open and the tensors to take from each; None: all that it holds."""
        if (self.path / SINGLE).is_file():
            return {SINGLE: None}
        index = self.path / INDEX
        if not index.is_file():
            raise ValueError(f"model.path={self.path}: neither {SINGLE} nor {INDEX} there; give the directory of a model in safetensors")
        return _index(index, _stamp(index))

    def _stamp(self, file: str) -> Stamp:
        try:
            return _stamp(self.path / file)
        except FileNotFoundError:
            raise ValueError(f"{self.path / INDEX}: names {file}, which is not there; download the model again") from None

    def _checked(self, entry: Entry, name: str) -> Entry:
        if entry.dtype not in TRAINABLE:
            raise ValueError(
                f"{self.path / entry.file}: {name} is {entry.dtype}, but only {', '.join(TRAINABLE)} can be trained; "
                "use the model's unquantized checkpoint"
            )
        return entry

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ValueError(f"{self.path}: no tensor {name} in its safetensors")
        return self._entries[name]


def open_safetensors(path: Path, framework: str) -> Any:
    """safetensors' handle of a file. Raises ValueError where it is not whole."""
    try:
        return safe_open(path, framework=framework)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download the model again") from None


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=8)
def _index(path: Path, stamp: Stamp) -> dict[str, list[str] | None]:
    """File -> names of its tensors, of an index that has this stamp."""
    try:
        places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of safetensors ({type(error).__name__}: {error}); download the model again") from None
    listing: dict[str, list[str] | None] = {file: [] for file in sorted(set(places.values()))}
    for name, file in places.items():
        listing[file].append(name)  # type: ignore[union-attr]
    return listing


@lru_cache(maxsize=1024)
def _header(path: Path, stamp: Stamp) -> dict[str, tuple[str, Shape]]:
    """Tensor -> (dtype, shape), of a file that has this stamp."""
    handle = open_safetensors(path, "numpy")
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - a handle is no mapping
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
