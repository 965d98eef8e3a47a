"""What the trainer computes with fewer passes over memory than torch would take: in Triton on CUDA, in torch elsewhere.

`vocabulary` reduces rows of logits and makes their gradients. `layer` is what lies between the matrix products of a transformer layer.
The Triton programs stand beside them and are imported only where they run.
"""

from slime.sync.kernels import on_triton

__all__ = ["on_triton"]
