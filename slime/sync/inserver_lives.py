"""The storages that hold a model's weights, as SGLang has them in memory: found, named, watched for being moved."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from slime.sync.livemap import Live
from slime.sync.records import ELEMENT_TYPES


class Moved(ValueError):
    """The model keeps a weight elsewhere than when its map was learned."""


class LiveTensors:
    """The storages of a module on one device, the first parameter's: of parameters and buffers (`weights`), and of tensors that its modules
    keep as plain attributes, which count only where load_weights writes to them. `taken` are addresses that belong to another model of this
    process, which shares them."""

    def __init__(self, model: torch.nn.Module, taken: frozenset[int] = frozenset()) -> None:
        self.lives: list[Live] = []
        self.weights: set[int] = set()
        self._tensors: list[torch.Tensor] = []
        self._places: list[Place] = []
        self._numbers: dict[int, int] = {}
        for name, tensor, weight, place in _tensors(model):
            if tensor.device != (self._tensors[0].device if self._tensors else tensor.device):
                continue
            storage = tensor.untyped_storage()
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in ELEMENT_TYPES or not storage.nbytes() or storage.data_ptr() in taken:
                continue
            number = self._numbers.setdefault(storage.data_ptr(), len(self.lives))
            if number == len(self.lives):
                self.lives.append(Live(name, dtype, storage.nbytes() // tensor.element_size()))
                self._tensors.append(tensor)
                self._places.append(place)
            if weight:
                self.weights.add(number)

    @property
    def device(self) -> torch.device:
        return self._tensors[0].device if self._tensors else torch.device("cpu")

    @property
    def addresses(self) -> np.ndarray:
        """uint64 [n], where each storage begins."""
        return np.array([tensor.untyped_storage().data_ptr() for tensor in self._tensors], np.uint64)

    def of(self, tensor: torch.Tensor) -> int | None:
        """Number of the storage that a tensor lies in."""
        return None if tensor.device.type == "meta" else self._numbers.get(tensor.untyped_storage().data_ptr())

    def name(self, live: int) -> str:
        return self.lives[live].name

    def dtype(self, live: int) -> torch.dtype:
        return self._tensors[live].dtype

    def check(self, wanted: Iterable[int]) -> None:
        """Raises Moved where the model has replaced one of the storages `wanted` since. Fast: it is called in the pause."""
        for number in wanted:
            found = self._places[number].tensor()
            if found is None or found.untyped_storage().data_ptr() != self._tensors[number].untyped_storage().data_ptr():
                raise Moved(f"{self.lives[number].name} is not where it was when the map was learned: learn again")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a tensor."""

    names: dict[str, Any]  # its parameters, buffers, or attributes
    name: str
    item: int | None = None  # of a list or tuple

    def tensor(self) -> torch.Tensor | None:
        """The one that is there now."""
        value = self.names.get(self.name)
        if self.item is not None:
            value = value[self.item] if isinstance(value, list | tuple) and self.item < len(value) else None
        return value if isinstance(value, torch.Tensor) else None


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool, Place]]:
    """(name, tensor, whether it is a parameter or a buffer, where it is kept)."""
    modules = list(model.named_modules())
    for path, module in modules:
        for place in map(partial(Place, module._parameters), module._parameters):
            yield from _named(path, place, True)
    for path, module in modules:
        for place in map(partial(Place, module._buffers), module._buffers):
            yield from _named(path, place, True)
    for path, module in modules:
        for name, value in vars(module).items():
            items = range(len(value)) if isinstance(value, list | tuple) and len(value) <= 64 else [None]
            for item in items:
                yield from _named(path, Place(vars(module), name, item), False)


def _named(path: str, place: Place, weight: bool) -> Iterator[tuple[str, torch.Tensor, bool, Place]]:
    tensor = place.tensor()
    if tensor is not None:
        name = place.name if place.item is None else f"{place.name}.{place.item}"
        yield (f"{path}.{name}" if path else name), tensor.detach(), weight, place
