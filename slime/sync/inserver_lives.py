"""The storages that hold a model's weights, as SGLang has them in memory: found, named, watched for being moved."""

from collections.abc import Iterable, Iterator
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
        self._numbers: dict[int, int] = {}
        for name, tensor, weight in _tensors(model):
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

    def check(self, model: torch.nn.Module, wanted: Iterable[int]) -> None:
        """Raises Moved where the model has replaced one of the storages `wanted` since."""
        found = {name: tensor.untyped_storage().data_ptr() for name, tensor, _ in _tensors(model)}
        for number in wanted:
            name = self.lives[number].name
            if found.get(name) != self._tensors[number].untyped_storage().data_ptr():
                raise Moved(f"{name} is not where it was when the map was learned: learn again")


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is a parameter or a buffer)."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data, True
    for name, buffer in model.named_buffers():
        yield name, buffer, True
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            yield from ((f"{path}.{found}" if path else found, tensor, False) for found, tensor in _held(name, value))


def _held(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, list | tuple) and len(value) <= 64:
        yield from ((f"{name}.{i}", item.detach()) for i, item in enumerate(value) if isinstance(item, torch.Tensor))
