"""What touches live weights: fingerprints of memory, entries written to and read from addresses, what differs and its coding.

One class each: compiled C on the CPU (native.py), Triton on CUDA (programs.py and diff_programs.py, which are imported there alone).
"""

import os

import torch


def on_triton(device: torch.device) -> bool:
    """Whether the Triton programs run: on CUDA, and anywhere under TRITON_INTERPRET=1, which lets a machine without a GPU test them."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of its own for copies beside what else a GPU does; None where there are no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    """Until all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
