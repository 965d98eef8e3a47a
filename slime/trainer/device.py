"""What a rank computes on, decided once at its start."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slime.trainer import without_te


@dataclass(frozen=True)
class Device:
    """A rank's device. Code that runs megatron-core enters `scope()` in its thread."""

    torch: torch.device
    backend: str  # of torch.distributed
    scope: Callable[[], contextlib.AbstractContextManager[None]]


def set_up(kind: str, threads: int) -> Device:
    """Make `kind` ("cpu" or "cuda") this process's device: patches, threads, current CUDA device.

    On CUDA the process must see exactly its own device, as Ray arranges. Raises RuntimeError where it sees none.
    """
    without_te.repair()
    if kind == "cpu":
        from slime.cpu import megatron

        torch.set_num_threads(threads)
        megatron.install()
        return Device(torch.device("cpu"), "gloo", megatron.scope)
    if not torch.cuda.is_available():
        raise RuntimeError("a trainer rank was given a GPU but torch sees none: install a CUDA build of torch, or set cluster.device=cpu")
    torch.cuda.set_device(0)
    return Device(torch.device("cuda", 0), "nccl", contextlib.nullcontext)
