"""What the trainer computes with fewer passes over memory than torch would take: in Triton on CUDA, in torch elsewhere.

`vocabulary` reduces rows of logits and makes their gradients. `layer` is what lies between the matrix products of a transformer layer.
The Triton programs stand beside them and are imported only where they run.
"""

import torch

from slime.sync.kernels import on_triton

__all__ = ["fuses_adam", "on_triton"]


def fuses_adam(device: torch.device) -> bool:
    """Whether torch's Adam is one kernel: where ours are."""
    return on_triton(device)
