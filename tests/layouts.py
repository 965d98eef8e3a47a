"""Oracles for layouts: every element counted, and the trainer's moves on numpy arrays."""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch

from slime.layout import Block, Layout, Move
from slime.trainer import blocks


def load(moves: Sequence[Move], hf: Mapping[str, np.ndarray], shard: np.ndarray) -> None:
    """`blocks.load` from whole HF arrays."""

    def read(name: str, block: Block) -> torch.Tensor:
        return blocks.view(torch.from_numpy(hf[name]), block)

    blocks.load(moves, read, torch.from_numpy(shard))


def export(moves: Sequence[Move], shard: np.ndarray, hf: Mapping[str, np.ndarray]) -> None:
    """`blocks.export` into whole HF arrays."""
    blocks.export(moves, torch.from_numpy(shard), {name: torch.from_numpy(array) for name, array in hf.items()})


def check_shard(layout: Layout, tp_rank: int, tp_size: int) -> None:
    """Assert that a shard's moves are disjoint and cover it, its padding at the end excepted."""
    size, padding = prod(layout.local_shape(tp_size)), layout.padding(tp_rank, tp_size)
    count = np.zeros(size, np.uint8)
    for move in layout.moves(tp_rank, tp_size):
        move.target.view(count)[...] += 1
    real = size - padding
    assert (count[:real] == 1).all() and (count[real:] == 0).all(), f"{layout}: moves of shard {tp_rank} of {tp_size} do not tile it"


def check_layout(layout: Layout, tp_size: int) -> None:
    """Assert that every shard is tiled and that together they hold every HF element once (replicated: once a rank)."""
    counts = {t.name: np.zeros(t.size, np.uint16) for t in layout.sources}
    for rank in range(tp_size):
        check_shard(layout, rank, tp_size)
        for move in layout.moves(rank, tp_size):
            move.source.view(counts[move.hf])[...] += 1
    copies = tp_size if layout.replicated else 1
    for name, count in counts.items():
        assert (count == copies).all(), f"{layout}: {tp_size} shards do not hold every element of {name} {copies} time(s)"
