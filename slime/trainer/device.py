"""What a rank computes on, decided once at its start, and all that differs between devices beside it (kernels stand in kernels/)."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slime.sync.bursts import burst
from slime.trainer import without_te


@dataclass(frozen=True)
class Device:
    """A rank's device. Code that runs megatron-core enters `scope()` in its thread."""

    torch: torch.device
    backend: str  # of torch.distributed
    threads: int  # that the rank has for itself
    pinned: bool  # whether host memory that is copied to and from is page-locked
    scope: Callable[[], contextlib.AbstractContextManager[None]]

    def burst(self, ranks: int) -> int:
        """Threads for a moment's work on the host, which so many ranks there do at once: beside a GPU a share of its cores."""
        return burst(ranks) if self.pinned else self.threads

    def most_memory(self) -> tuple[str, Tensor] | None:
        """A GPU's name, and the most bytes that tensors took there since the last call (fp32 scalar); None on a CPU."""
        if self.torch.type != "cuda":
            return None
        most = torch.tensor(float(torch.cuda.max_memory_allocated(self.torch)), device=self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        return torch.cuda.get_device_name(self.torch), most


def set_up(kind: str, threads: int) -> Device:
    """Make `kind` ("cpu" or "cuda") this process's device: patches, threads, current CUDA device.

    On CUDA the process must see exactly its own device, as Ray arranges. Raises RuntimeError where it sees none.
    """
    without_te.repair()
    if kind == "cpu":
        from slime.cpu import megatron

        torch.set_num_threads(threads)
        megatron.install()
        return Device(torch.device("cpu"), "gloo", threads, False, megatron.scope)
    if not torch.cuda.is_available():
        raise RuntimeError("a trainer rank was given a GPU but torch sees none: install a CUDA build of torch, or set cluster.device=cpu")
    torch.cuda.set_device(0)
    return Device(torch.device("cuda", 0), "nccl", threads, True, contextlib.nullcontext)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked where the tensor is on a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def give_back() -> None:
    """Memory of the device that torch keeps for itself is anybody's again."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_state() -> Tensor | None:
    """Of the GPU's generator; None on a CPU, whose is torch's own."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: Tensor | None) -> None:
    """What `random_state` gave."""
    if state is not None:
        torch.cuda.set_rng_state(state)
