"""The moves of `slime.layout` on torch tensors: Hugging Face tensors into a rank's shard and back."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from slime.layout import Block, Move


def view(tensor: Tensor, block: Block) -> Tensor:
    """The block of a contiguous tensor, as a view [block.shape]; the tensor may itself lie inside a larger buffer."""
    assert tensor.is_contiguous() and block.end <= tensor.numel(), (block, tensor.shape)
    return tensor.as_strided(block.shape, block.strides, tensor.storage_offset() + block.offset)


def load(moves: Sequence[Move], read: Callable[[str, Block], Tensor], shard: Tensor) -> None:
    """Fill a contiguous shard; read(name, block) gives a block of an HF tensor. Elements without a source become 0."""
    if sum(move.target.size for move in moves) < shard.numel():
        shard.zero_()
    for move in moves:
        view(shard, move.target).copy_(read(move.hf, move.source))


def export(moves: Sequence[Move], shard: Tensor, hf: Mapping[str, Tensor]) -> None:
    """Write a contiguous shard into contiguous HF tensors; the inverse of `load`, without elements that have no source."""
    for move in moves:
        view(hf[move.hf], move.source).copy_(view(shard, move.target))
