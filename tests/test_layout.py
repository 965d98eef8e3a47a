"""Properties of the index algebra, on layouts of random sizes."""

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.layout import GLU, QKV, Block, Cols, GateUp, HFTensor, Layout, Move, Rows, Vocab, Whole, to_hf
from tests.layouts import check_layout, check_shard, export, load

SIZES = st.integers(1, 4)
FAST = settings(max_examples=120, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout and a TP size that splits it."""
    tp, a, b, dim = draw(st.sampled_from((1, 2, 3, 4))), draw(SIZES), draw(SIZES), draw(SIZES)
    trailing = draw(st.sampled_from(((), (b,))))  # biases and weights
    kind = draw(st.sampled_from(("whole", "rows", "cols", "vocab", "qkv", "qkv_split", "glu", "gate_up")))
    if kind == "whole":
        return Whole(HFTensor("x", (a, *trailing))), tp
    if kind == "rows":
        return Rows(HFTensor("x", (a * tp, *trailing))), tp
    if kind == "cols":
        return Cols(HFTensor("x", (a, b * tp))), tp
    if kind == "vocab":
        vocab = draw(st.integers(1, 17))
        padded = -(-vocab // tp) * tp + draw(st.integers(0, 3)) * tp
        return Vocab(HFTensor("x", (vocab, *trailing)), padded), tp
    if kind == "glu":
        return GLU(HFTensor("gate", (a * tp, *trailing)), HFTensor("up", (a * tp, *trailing))), tp
    if kind == "gate_up":
        return GateUp(HFTensor("gate_up", (2 * a * tp, *trailing))), tp
    groups, per_group = a * tp, draw(SIZES)
    if kind == "qkv_split":  # several ranks to a group; each takes the same rows of it
        groups, per_group = a, (1 + draw(SIZES)) * 2
        tp, dim = a * 2, dim * 2
    heads = groups * per_group
    q, k, v = (HFTensor(n, (h * dim, *trailing)) for n, h in (("q", heads), ("k", groups), ("v", groups)))
    return QKV(q, k, v, heads, groups, dim), tp


def numbered(layout: Layout) -> dict[str, np.ndarray]:
    """HF tensors in which every element is its own number."""
    tensors, start = {}, 1
    for t in layout.sources:
        tensors[t.name] = np.arange(start, start + t.size).reshape(t.shape)
        start += t.size
    return tensors


def shards(layout: Layout, hf: dict[str, np.ndarray], tp: int) -> list[np.ndarray]:
    parts = [np.full(layout.local_shape(tp), -7) for _ in range(tp)]
    for rank, part in enumerate(parts):
        load(layout.moves(rank, tp), hf, part)
    return parts


@FAST
@given(layouts())
def test_moves_tile_every_shard_and_every_hf_tensor(case: tuple[Layout, int]) -> None:
    check_layout(*case)


@FAST
@given(layouts())
def test_load_then_export_returns_every_element(case: tuple[Layout, int]) -> None:
    layout, tp = case
    hf = numbered(layout)
    out = {name: np.zeros_like(t) for name, t in hf.items()}
    for rank, part in enumerate(shards(layout, hf, tp)):
        assert (part == 0).sum() == layout.padding(rank, tp)
        export(layout.moves(rank, tp), part, out)
    for name in hf:
        np.testing.assert_array_equal(out[name], hf[name])


@pytest.mark.thorough
@FAST
@given(layouts(), st.randoms(use_true_random=False))
def test_positions_translate_to_where_the_values_came_from(case: tuple[Layout, int], random) -> None:
    layout, tp = case
    hf = numbered(layout)
    for rank, part in enumerate(shards(layout, hf, tp)):
        positions = np.array(random.choices(range(part.size), k=9), np.int64)
        moves = layout.moves(rank, tp)
        which, where = to_hf(moves, positions)
        values = part.reshape(-1)[positions]
        np.testing.assert_array_equal(which == -1, values == 0)  # padding, and nothing else, has no source
        np.testing.assert_array_equal(where == -1, values == 0)
        found = [hf[moves[i].hf].reshape(-1)[at] for i, at in zip(which, where, strict=True) if i >= 0]
        np.testing.assert_array_equal(found, values[values > 0])


@FAST
@given(st.integers(0, 5), SIZES, SIZES, SIZES, SIZES, st.integers(0, 3), st.integers(0, 3))
def test_a_block_finds_its_own_positions_and_no_others(offset: int, a: int, b: int, c: int, inner: int, gap: int, wider: int) -> None:
    middle = c * inner + gap
    block = Block(offset, (a, b, c), (b * middle + wider, middle, inner))
    flat = np.arange(block.end + 5)
    inside, index = block.find(flat)
    own = block.view(flat).reshape(-1)
    np.testing.assert_array_equal(flat[inside], np.sort(own))
    np.testing.assert_array_equal(own[index[inside]], flat[inside])
    np.testing.assert_array_equal(block.at(index[inside]), flat[inside])
    assert block.end == own.max() + 1


def test_qkv_is_interleaved_by_query_group() -> None:
    """4 heads, 2 groups, head_dim 1: [q0 q1 k0 v0 | q2 q3 k1 v1], one group a rank."""
    q, k, v = HFTensor("q", (4, 1)), HFTensor("k", (2, 1)), HFTensor("v", (2, 1))
    hf = {"q": np.array([[10], [11], [12], [13]]), "k": np.array([[20], [21]]), "v": np.array([[30], [31]])}
    first, second = shards(QKV(q, k, v, heads=4, groups=2, head_dim=1), hf, 2)
    assert first.ravel().tolist() == [10, 11, 20, 30] and second.ravel().tolist() == [12, 13, 21, 31]


def test_a_query_group_is_split_over_more_ranks_than_groups() -> None:
    """4 heads, 1 group, head_dim 1, 2 ranks: [q0 q1 q2 | q3 k0 v0], a stretch of the rows of SelfAttention's one group each."""
    q, k, v = HFTensor("q", (4, 1)), HFTensor("k", (1, 1)), HFTensor("v", (1, 1))
    hf = {"q": np.array([[10], [11], [12], [13]]), "k": np.array([[20]]), "v": np.array([[30]])}
    first, second = shards(QKV(q, k, v, heads=4, groups=1, head_dim=1), hf, 2)
    assert first.ravel().tolist() == [10, 11, 12] and second.ravel().tolist() == [13, 20, 30]


def test_gate_and_up_are_split_apart() -> None:
    hf = {"gate": np.array([[1], [2]]), "up": np.array([[3], [4]])}
    first, second = shards(GLU(HFTensor("gate", (2, 1)), HFTensor("up", (2, 1))), hf, 2)
    assert first.ravel().tolist() == [1, 3] and second.ravel().tolist() == [2, 4]
    first, second = shards(GateUp(HFTensor("gate_up", (4, 1))), {"gate_up": np.array([[1], [2], [3], [4]])}, 2)
    assert first.ravel().tolist() == [1, 3] and second.ravel().tolist() == [2, 4]


def test_a_rank_may_hold_nothing_but_padding() -> None:
    layout = Vocab(HFTensor("x", (5, 2)), padded=16)
    assert [layout.padding(r, 4) for r in range(4)] == [0, 6, 8, 8] and layout.moves(3, 4) == ()
    which, where = to_hf(layout.moves(3, 4), np.arange(8))
    assert set(which) == set(where) == {-1}


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Rows(HFTensor("w", (6, 2))), "trainer.tensor_parallel=4 cannot split the 6 rows of w; choose a divisor of 6"),
        (Cols(HFTensor("w", (4, 6))), "trainer.tensor_parallel=4 cannot split the 6 columns of w"),
        (GLU(HFTensor("g", (6,)), HFTensor("u", (6,))), "trainer.tensor_parallel=4 cannot split the 6 rows of g"),
        (Vocab(HFTensor("w", (5, 2)), 6), "trainer.tensor_parallel=4 cannot split the 6 padded rows of w"),
        (GateUp(HFTensor("w", (12, 2))), "trainer.tensor_parallel=4 cannot split the 6 rows of each half of w; choose a divisor of 6"),
        (
            QKV(HFTensor("q", (24, 2)), HFTensor("k", (12, 2)), HFTensor("v", (12, 2)), heads=12, groups=6, head_dim=2),
            "trainer.tensor_parallel=4 cannot split the 6 key/value heads of k; choose a divisor of 6",
        ),
        (
            QKV(HFTensor("q", (24, 2)), HFTensor("k", (6, 2)), HFTensor("v", (6, 2)), heads=12, groups=3, head_dim=2),
            "trainer.tensor_parallel=4 cannot share out the 3 key/value heads of k; choose a divisor or a multiple of 3",
        ),
        (
            QKV(HFTensor("q", (6, 2)), HFTensor("k", (2, 2)), HFTensor("v", (2, 2)), heads=3, groups=1, head_dim=2),
            "trainer.tensor_parallel=4 cannot split the 3 heads of q; choose a divisor of 3",
        ),
        (
            QKV(HFTensor("q", (4, 2)), HFTensor("k", (1, 2)), HFTensor("v", (1, 2)), heads=4, groups=1, head_dim=1),
            "trainer.tensor_parallel=4 cannot split the 6 rows of q, k and v together; choose a divisor of 6",
        ),
    ],
)
def test_a_tp_size_that_does_not_divide_is_refused_by_name(layout: Layout, text: str) -> None:
    for ask in (lambda: layout.local_shape(4), lambda: layout.moves(0, 4)):
        with pytest.raises(ValueError, match=text):
            ask()


class Broken(Rows):
    """Rows whose moves overlap on the first rank and leave a gap on the last."""

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        size = prod(self.local_shape(tp_size))
        stretch = Block(0, (size,), (1,))
        return (Move(self.hf.name, stretch, stretch),) * (2 if tp_rank == 0 else 0)


class Repeated(Rows):
    """Every rank takes the first rows."""

    def moves(self, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        return Rows.moves(self, 0, tp_size)


def test_the_checks_find_overlaps_gaps_and_repeats() -> None:
    tensor = HFTensor("w", (4, 2))
    for rank in (0, 1):
        with pytest.raises(AssertionError, match="do not tile"):
            check_shard(Broken(tensor), rank, 2)
    check_shard(Repeated(tensor), 1, 2)
    with pytest.raises(AssertionError, match=r"do not hold every element of w 1 time"):
        check_layout(Repeated(tensor), 2)
    with pytest.raises(AssertionError, match="strides do not nest"):
        Block(0, (2, 3), (2, 1))


def test_any_dtype_moves_bit_by_bit() -> None:
    """NaN payloads and -0.0 included: values are copied, never computed with."""
    bits = np.array([0x7FC1, 0xFF81, 0x8000, 0x0001], np.uint16).reshape(2, 2)
    layout, shard = Cols(HFTensor("w", (2, 2))), np.zeros((2, 1), np.uint16)
    load(layout.moves(1, 2), {"w": bits}, shard)
    assert shard.ravel().tolist() == [0xFF81, 0x0001]
