"""What touches live weights: fingerprints of memory, entries written to and read from addresses, what differs and its coding.

One class each: compiled C on the CPU (native.py), Triton on CUDA (programs.py and diff_programs.py, which are imported there alone).
"""

import os

import torch


def on_triton(device: torch.device) -> bool:
    """Whether the Triton programs run: on CUDA, and anywhere under TRITON_INTERPRET=1, which lets a machine without a GPU test them."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
