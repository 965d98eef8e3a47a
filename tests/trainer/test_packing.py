from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.trainer.packing import pack, partition, partition_apart, split_groups, updates_of
from slime.types import Batch
from tests.trainer.ranks import make_batch

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60).map(lambda x: np.array(x))


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 100))
def test_partition_places_every_sequence_once_within_the_budget(lengths, ranks, budget):
    plan = partition(lengths, ranks, budget, 64)
    assert len({len(mine) for mine in plan}) == 1, "every rank has the same number of micro-batches"
    assert sorted(i for mine in plan for b in mine for i in b) == list(range(len(lengths)))
    for b in (b for mine in plan for b in mine):
        assert lengths[b].sum() <= budget or len(b) == 1
        assert (np.diff(lengths[b]) >= 0).all(), "in order of length"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 100), st.booleans(), st.integers(0, 1000))
def test_what_shares_a_micro_batch_depends_on_its_group_alone(lengths, ranks, budget, anywhere, seed):
    apart = np.random.default_rng(seed).integers(0, 6, len(lengths))
    plan = partition_apart(lengths, apart, ranks, budget, 64, anywhere)
    assert len({len(mine) for mine in plan}) == 1
    assert sorted(i for mine in plan for b in mine for i in b) == list(range(len(lengths)))
    found = {tuple(b) for mine in plan for b in mine if len(b)}
    for number in np.unique(apart):
        own = np.flatnonzero(apart == number)
        alone = partition(lengths[own], ranks, budget, 64)
        assert {tuple(own[b]) for mine in alone for b in mine if len(b)} <= found
        if not anywhere:  # side by side: the same rank, and as many ranks at once
            begun = sum(len(partition(lengths[apart == n], ranks, budget, 64)[0]) for n in np.unique(apart) if n < number)
            for mine, theirs in zip(plan, alone, strict=True):
                assert [b.tolist() for b in mine[begun : begun + len(theirs)]] == [own[b].tolist() for b in theirs]


def test_groups_of_few_sequences_leave_no_rank_without_work():
    lengths, apart = np.full(24, 30), np.repeat(np.arange(12), 2)
    rows = [[len(b) for b in mine] for mine in partition_apart(lengths, apart, 8, 4096, 64, anywhere=True)]
    assert rows == [[1, 1, 1]] * 8
    assert sum(not n for mine in partition_apart(lengths, apart, 8, 4096, 64, anywhere=False) for n in [sum(map(len, mine))]) == 6


def test_partition_balances_work():
    lengths = np.random.default_rng(0).integers(5, 400, 300)
    plan = partition(lengths, 4, 4096, 256)
    work = np.array([[(lengths[b] * (1 + lengths[b] / 256)).sum() for b in mine] for mine in plan])
    assert work.sum(1).max() / work.sum(1).mean() < 1.02
    assert work.max() / work.mean() < 1.1
    least = -(-int(lengths.sum()) // (4 * 4096))
    assert len(plan[0]) <= least + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000), st.sampled_from([1, 2, 3, 8]))
def test_pack_predicts_each_trained_token_from_the_row_before_it(samples, seed, multiple):
    batch = make_batch(samples, seed=seed)
    chosen = np.random.default_rng(seed).permutation(samples)[: max(1, samples // 2)]
    row = pack(batch, chosen, multiple)
    assert len(row.tokens) % multiple == 0 and sum(row.lengths) == len(row.tokens) == len(row.positions)
    assert len(row.lengths) - len(chosen) in (0, 1)
    np.testing.assert_array_equal(row.labels, batch.tokens[row.trained])
    np.testing.assert_array_equal(row.tokens[row.rows + 1], row.labels)
    np.testing.assert_array_equal(row.tokens[row.rows], batch.tokens[row.trained - 1])
    np.testing.assert_array_equal(chosen[row.sample], batch.sample_of_token[row.trained])
    np.testing.assert_array_equal(row.positions[row.rows], row.trained - 1 - batch.cu_seqlens[batch.sample_of_token[row.trained]])
    assert set(row.trained) == set(np.flatnonzero(batch.loss_mask & np.isin(batch.sample_of_token, chosen)))


def test_pack_gives_the_example_of_its_module():
    batch = replace(
        make_batch(2),
        tokens=np.array([7, 1, 8, 2, 9, 4, 5], np.int32),
        cu_seqlens=np.array([0, 5, 7]),
        loss_mask=np.array([0, 0, 0, 1, 1, 0, 1], bool),
    )
    row = pack(batch, np.array([1, 0]), 4)
    assert row.tokens.tolist() == [4, 5, 7, 1, 8, 2, 9, 0] and row.lengths == [2, 5, 1]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0]
    assert row.rows.tolist() == [0, 4, 5] and row.labels.tolist() == [5, 2, 9] and row.sample.tolist() == [0, 1, 1]
    assert row.trained.tolist() == [6, 3, 4]


def test_empty_micro_batch_is_padding_alone():
    row = pack(make_batch(2), np.zeros(0, np.int64), 4)
    assert row.lengths == [4] and len(row.rows) == len(row.trained) == 0


def test_first_token_of_a_sequence_is_never_trained():
    batch = make_batch(2)
    batch.loss_mask[0] = True
    with pytest.raises(AssertionError, match="first token"):
        pack(batch, np.arange(2), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 10))
def test_updates_hold_whole_groups(group, parts):
    group = np.array(group)
    if len(set(group)) < parts:
        with pytest.raises(ValueError, match=r"trainer\.updates_per_batch"):
            split_groups(group, parts)
        return
    split = split_groups(group, parts)
    assert len(split) == parts and all(len(s) for s in split)
    assert sorted(np.concatenate(split)) == list(range(len(group)))
    assert sum(len(set(group[s])) for s in split) == len(set(group))


def test_an_optimizer_step_with_nothing_to_train_on_is_refused():
    """A sample of which nothing is trained is none; nor is a whole group beside another one of its step."""
    batch = make_batch(16)  # four groups of four
    batch.loss_mask[: batch.cu_seqlens[4]] = False
    assert [len(samples) for samples in updates_of(batch, 2)] == [8, 8]
    says = r"^optimizer step 1 of 4 has 4 samples and no token that is trained: momentum .*; lower trainer\.updates_per_batch, or leave "
    with pytest.raises(ValueError, match=says):
        updates_of(batch, 4)
    batch.loss_mask[:] = False
    with pytest.raises(ValueError, match=r"^optimizer step 1 of 1 has 16 samples"):
        updates_of(batch, 1)


def test_batch_select_keeps_a_part_intact():
    batch = make_batch(8)
    part: Batch = batch.select(split_groups(batch.group, 2)[1])
    np.testing.assert_array_equal(part.tokens, batch.tokens[batch.cu_seqlens[4] :])
