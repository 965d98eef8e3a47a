"""A rank gives up its device's memory and takes it back (cluster.share=swap): nothing that refers to it is made anew.

    kept      parameters, buffers, main weights, Adam's moments, frozen models, the snapshot of the weights that engines have: their bytes
              go to page-locked host memory and come back
    dropped   gradients, of which nothing is read between two updates: they come back as zeros

It works on storages, below tensors: each is emptied in place (`resize_(0)`), so that every view of it, of which megatron-core's buckets,
shards and parameters are many, is right again when the storage has its bytes again. In between every read of them is an error. Host memory
is made by the first turn and kept: what is kept, once more.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slime.trainer import device
from slime.trainer.host_buffers import HostBuffers
from slime.trainer.publish import Snapshot
from slime.trainer.state import Trained, Trainer


class Offload:
    """What one rank holds on its device, and where it is."""

    def __init__(self, *, pinned: bool) -> None:
        self.away = False  # whether the memory is given up
        self._host = HostBuffers(pinned=pinned)
        self._kept: list[tuple[torch.UntypedStorage, Tensor]] = []  # with their bytes in host memory
        self._dropped: list[tuple[torch.UntypedStorage, int]] = []  # with their sizes

    def leave(self, trained: Iterable[Trained], snapshots: Iterable[Snapshot]) -> int:
        """Give up the memory of these; returns the bytes on the device that are free now. Between two updates."""
        assert not self.away, "the memory is given up already"
        held = list(trained)
        for of in held:
            of.model.optimizer.zero_grad()
        kept = _storages(tensor for of in held for tensor in _kept(of))
        kept |= _storages(bits for snapshot in snapshots for bits in snapshot.held if bits.device == held[0].model.device)
        dropped = {place: storage for place, storage in _storages(_gradients(held)).items() if place not in kept}
        for number, storage in enumerate(kept.values()):
            self._kept.append((storage, self._host.copy((number, storage.nbytes()), _bytes(storage))))
        self._dropped = [(storage, storage.nbytes()) for storage in dropped.values()]
        self._host.complete()
        self.away = True
        freed = sum(storage.nbytes() for storage in [*kept.values(), *dropped.values()])
        for storage in [*kept.values(), *dropped.values()]:
            storage.resize_(0)
        device.give_back()
        return freed

    def enter(self) -> None:
        """Take it back: every bit of what is kept is as it was."""
        assert self.away, "the memory was not given up"
        for storage, host in self._kept:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
        for storage, size in self._dropped:
            storage.resize_(size)
            _bytes(storage).zero_()
        self._host.complete()
        self._kept, self._dropped, self.away = [], [], False


def _kept(trained: Trained) -> Iterator[Tensor]:
    """Everything of a trained model that must outlive a turn."""
    model = trained.model
    for stage in model.stages:
        yield from stage.module.parameters()
        yield from stage.module.buffers()
        yield from (buffer.param_data for buffer in _buffers(stage) if buffer.param_data is not None)
    for part in model.optimizer.chained_optimizers:
        if part.optimizer is None:  # of a stage without anything of its kind
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    frozen = [trained.reference] if trained.reference is not None else []
    if isinstance(trained, Trainer):
        frozen += trained.teachers.values()
    for still in frozen:
        for gpt in still.stages:
            yield from gpt.parameters()
            yield from gpt.buffers()


def _gradients(trained: Iterable[Trained]) -> Iterator[Tensor]:
    """The buffers that gradients accumulate in."""
    for of in trained:
        for stage in of.model.stages:
            yield from (buffer.grad_data for buffer in _buffers(stage))


def _buffers(stage: Any) -> list[Any]:
    """megatron-core's, of all parameters of a stage: dense ones and experts."""
    return [*stage.buffers, *stage.expert_parallel_buffers]


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage once, by its address. What torch did not allocate, or NumPy has seen (on a CPU), cannot be emptied and stays."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes() and storage.resizable()}


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """uint8 [n], the storage itself."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
