"""The blocks of a rank: which it holds whole, how they are listed and coded."""

import numpy as np
import pytest
import torch

from slime.sync import fingerprint, own_blocks, wire
from slime.sync.own_blocks import OwnBlocks, Runs
from slime.sync.records import BLOCK, ModelSpec, TensorSpec

SPEC = ModelSpec(
    (
        TensorSpec("a", (BLOCK + 1000,), "bfloat16"),
        TensorSpec("b", (500,), "float32"),
        TensorSpec("c", (2000,), "bfloat16"),
        TensorSpec("d", (300,), "int16"),
    )
)
# memory, offset in it, tensor, position there, elements. The last 200 of `c` are on another rank.
ROWS = [(0, 1000, 0, 0, BLOCK), (0, 0, 0, BLOCK, 1000), (1, 0, 1, 0, 500), (2, 0, 2, 900, 900), (2, 900, 2, 0, 900), (3, 0, 3, 0, 300)]
KEYS = np.arange(1, 5, dtype=np.uint64)
TABLE = fingerprint.table(5)


def blocks():
    return OwnBlocks.of(SPEC, Runs(*np.array(ROWS, np.int64).T), "cpu")


def memories(seed):
    g = np.random.default_rng(seed)
    sizes = [2 * (BLOCK + 1000), 4 * 500, 2 * 1800, 2 * 300]
    types = (torch.int16, torch.int32, torch.int16, torch.int16)
    return [torch.from_numpy(g.integers(0, 256, n, np.uint8)).view(t) for n, t in zip(sizes, types, strict=True)]


def stepped(held, every):
    """One unit away at each n-th element."""
    live = [memory.clone() for memory in held]
    for memory in live:
        memory[::every] ^= 1
    return live


def tensors(sides):
    """What the memories hold of each HF tensor; zero elsewhere."""
    found = [np.zeros(tensor.size, tensor.type.bits) for tensor in SPEC.tensors]
    for memory, offset, tensor, source, count in ROWS:
        bits = sides[memory][offset : offset + count].numpy()
        found[tensor][source : source + count] = bits.view(found[tensor].dtype)
    return found


def test_blocks_are_ordered_by_dtype_and_known_to_be_whole() -> None:
    own = blocks()
    assert own.tensor.tolist() == [0, 0, 2, 3, 1] and own.number.tolist() == [0, 1, 3, 4, 2]  # narrow ones first
    assert own.start.tolist() == [0, BLOCK, 0, 0, 0] and own.length.tolist() == [BLOCK, 1000, 2000, 300, 500]
    assert own.held.tolist() == [BLOCK, 1000, 1800, 300, 500] and own.whole.tolist() == [True, True, False, True, True]


def test_batches_are_of_one_dtype_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    own = blocks()
    assert [batch.tolist() for batch in own.batches(np.array([5, 0, 7, 1, 2]))] == [[0, 2], [4], [3]]
    assert own.batches(np.zeros(5, np.int64)) == []
    monkeypatch.setattr(own_blocks, "LISTED", 10)
    assert [batch.tolist() for batch in own.batches(np.array([5, 5, 1, 11, 12]))] == [[0, 1], [2], [4], [3]]


@pytest.mark.parametrize("listed", [1 << 26, 700])
def test_changes_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch, listed: int) -> None:
    monkeypatch.setattr(own_blocks, "LISTED", listed)
    own, held = blocks(), memories(1)
    live = stepped(held, 7)
    own.diff.count(live, held)
    old, new = tensors(held), tensors(live)
    everything = np.array([False, True, True, False, True])
    for tensor, shares in own.changes(np.arange(5), everything).items():
        positions, before, after = (np.concatenate(column) for column in zip(*((s.positions, s.old, s.new) for s in shares), strict=True))
        assert sorted(positions.tolist()) == positions.tolist() and positions.dtype == np.int64
        expected = old[tensor] != new[tensor]
        for block in np.flatnonzero((own.tensor == tensor) & everything).tolist():
            expected[own.start[block] : own.start[block] + own.held[block]] = True
        assert positions.tolist() == np.flatnonzero(expected).tolist()
        assert before.tolist() == old[tensor][positions].tolist() and after.tolist() == new[tensor][positions].tolist()


def test_what_is_coded_alone_and_the_changes_of_the_rest_are_a_part() -> None:
    """And the part is the one that all changes at a time would give."""
    own, held = blocks(), memories(2)
    live = stepped(held, 50)
    counts = own.diff.count(live, held)
    old, new = tensors(held), tensors(live)
    coded, sums = own.code(own.batches(counts), own.whole, KEYS, TABLE, threads=2)
    rest = np.flatnonzero(~own.whole)
    shares = own.changes(rest, np.zeros(len(rest), bool))
    changes = [share for tensor in sorted(shares) for share in shares[tensor]]
    payload = wire.lay_out(SPEC, range(4), [*coded, wire.encode_blocks(SPEC, range(4), changes, "steps")]).join()
    every = own.changes(np.arange(5), np.zeros(5, bool))
    assert payload == wire.encode_part(SPEC, range(4), [share for tensor in sorted(every) for share in every[tensor]], "steps")
    for change in wire.decode_part(SPEC, range(4), payload, old.__getitem__):
        old[change.tensor][change.positions] = change.new
    for tensor, (before, after) in enumerate(zip(old, new, strict=True)):
        assert np.array_equal(before, after)
        full = [fingerprint.full(tensors(side)[tensor], int(KEYS[tensor]), TABLE) for side in (live, held)]
        assert sums[tensor] == (full[0] - full[1]) % 2**64
    assert sum(len(blocks.rows) for blocks in coded) == 4 and len(rest) == 1
    assert [blocks.of_tensors(range(1, 3)).rows["tensor"].tolist() for blocks in coded] == [[], [1], []]
