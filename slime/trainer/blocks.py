"""Blocks of `slime.layout` on torch tensors."""

from torch import Tensor

from slime.layout import Block


def view(tensor: Tensor, block: Block) -> Tensor:
    """The block of a contiguous tensor, as a view [block.shape]; the tensor may itself lie inside a larger buffer."""
    assert tensor.is_contiguous() and block.end <= tensor.numel(), (block, tensor.shape)
    return tensor.as_strided(block.shape, block.strides, tensor.storage_offset() + block.offset)
