"""The headers of a Hugging Face checkpoint's safetensors: names, shapes and dtypes of its tensors. Needs no torch, which takes seconds to
import."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from slime.layout import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TRAINABLE = ("F32", "BF16", "F16")


class HFHeaders:
    """The tensors of a checkpoint directory: model.safetensors, or the shards of model.safetensors.index.json. Each file is opened once and
    stays open. Use as a context manager."""

    framework = "numpy"  # what safetensors opens the files for

    def __init__(self, path: str | Path) -> None:
        """Opens the files. Raises ValueError naming the place: no safetensors, a shard or tensor that the index names but that is not
        there, a file that is not safetensors, a dtype other than float32, bfloat16 and float16."""
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        for file, names in self._listing().items():
            self._files[file] = handle = self._open(file)
            held = set(handle.keys())
            for name in sorted(held) if names is None else names:
                if name not in held:
                    raise ValueError(f"{self.path / INDEX}: places {name} in {file}, which does not hold it; download the model again")
                self._slices[name] = self._checked(file, name, handle.get_slice(name))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._slices)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the file's header. Raises ValueError for a name that is not there; so do the other methods."""
        return tuple(self._slice(name).get_shape())

    def close(self) -> None:
        """Lets the files go; nothing can be read afterwards."""
        self._slices, self._files = {}, {}

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
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: not an index of safetensors ({type(error).__name__}: {error}); download the model again") from None
        listing: dict[str, list[str] | None] = {file: [] for file in sorted(set(places.values()))}
        for name, file in places.items():
            listing[file].append(name)  # type: ignore[union-attr]
        return listing

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework=self.framework)
        except FileNotFoundError:
            raise ValueError(f"{self.path / INDEX}: names {file}, which is not there; download the model again") from None
        except SafetensorError as error:
            raise ValueError(f"{self.path / file}: not a whole safetensors file ({error}); download the model again") from None

    def _checked(self, file: str, name: str, part: Any) -> Any:
        if part.get_dtype() not in TRAINABLE:
            raise ValueError(
                f"{self.path / file}: {name} is {part.get_dtype()}, but only {', '.join(TRAINABLE)} can be trained; "
                "use the model's unquantized checkpoint"
            )
        return part

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            raise ValueError(f"{self.path}: no tensor {name} in its safetensors")
        return self._slices[name]
