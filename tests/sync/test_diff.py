"""Blocks counted and shares put together."""

import numpy as np
import pytest

from slime.sync.diff import Grid, merge
from slime.sync.records import BLOCK, Changes, ModelSpec, TensorSpec

SPEC = ModelSpec((TensorSpec("a", (3, 5), "bfloat16"), TensorSpec("b", (2 * BLOCK + 10,), "float32"), TensorSpec("c", (BLOCK,), "uint8")))


def test_blocks_are_numbered_through_the_tensors() -> None:
    grid = Grid.of(SPEC)
    assert grid.first.tolist() == [0, 1, 4, 5] and grid.blocks == 5
    assert grid.sizes.tolist() == [15, BLOCK, BLOCK, 10, BLOCK]
    assert grid.by_tensor(np.array([7, 1, 2, 3, 9])).tolist() == [7, 6, 9]


def test_a_block_is_complete_when_more_than_three_tenths_changed() -> None:
    counts = np.array([4, 314572, 314573, 3, 0])  # BLOCK * 0.3 = 314572.8
    assert Grid.of(SPEC).complete(counts).tolist() == [False, False, True, False, False]
    counts[[0, 3]] = 5, 4
    assert Grid.of(SPEC).complete(counts).tolist() == [True, False, True, True, False]


def share(*positions: int) -> Changes:
    at = np.array(positions, np.int64)
    return Changes(1, at, at.astype(np.uint32), at.astype(np.uint32) * 3)


def test_shares_are_merged_in_order() -> None:
    for shares in ([share(1, 4), share(7)], [share(7), share(4, 1)], [share(4), share(), share(1, 7)]):
        merged = merge(shares)
        assert (merged.tensor, merged.positions.tolist()) == (1, [1, 4, 7])
        assert merged.old.tolist() == [1, 4, 7] and merged.new.tolist() == [3, 12, 21] and merged.new.dtype == np.uint32


def test_an_element_of_two_shares_is_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"two ranks list the same element"):
        merge([share(1, 4), share(3, 4)])
