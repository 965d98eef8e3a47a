"""Host memory that checkpoints are copied into: made by the first save and kept for the next ones; page-locked where a GPU copies into it.

    buffers = HostBuffers(pinned=True)
    held = buffers.copy("embedding", weight)            # on the way
    sums = buffers.take("exp_avg", (1 << 20,), torch.float32)
    buffers.holds(sums[3:5])                            # True
    buffers.complete()                                  # what was on the way is there

New memory for every save would cost as much time as the copy: the kernel clears each page first.
"""

import weakref
from collections.abc import Hashable

import numpy as np
import torch


class HostBuffers:
    """Tensors in host memory by name, zeros at first. A name keeps its shape and dtype."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._storages: set[int] = set()

    def take(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The memory of `name`, as the last one left it. Raises RuntimeError where it cannot be page-locked."""
        if name not in self._tensors:
            self._tensors[name] = self._make(shape, dtype)
            self._storages.add(self._tensors[name].untyped_storage().data_ptr())
        taken = self._tensors[name]
        assert (taken.shape, taken.dtype) == (shape, dtype), f"{name} was {taken.dtype}{list(taken.shape)} at the save before"
        return taken

    def copy(self, name: Hashable, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in the memory of `name`; page-locked memory has it after `complete`."""
        return self.take(name, tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=self._pinned)

    def complete(self) -> None:
        """Wait until all that was copied is there."""
        if self._pinned:
            torch.cuda.synchronize()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a part of this memory."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.zeros(max(size, dtype.itemsize), np.uint8)
        if self._pinned:  # torch's own page-locked memory is rounded up to a power of two
            cuda = torch.cuda.cudart()
            torch.cuda.check_error(cuda.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
            weakref.finalize(memory, cuda.cudaHostUnregister, memory.ctypes.data).atexit = False
        return torch.from_numpy(memory)[:size].view(dtype).view(shape)
