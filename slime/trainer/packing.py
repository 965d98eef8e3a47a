"""Which sequences go to which rank and micro-batch, and the packed rows they become. Pure numpy: every rank computes the same plan.

With context parallelism, `ranks` ranks share a row. Each sequence is padded at its end to 2 x ranks chunks, and rank r holds chunks r and
2 x ranks - 1 - r of it, one from the front and one from the back: attention is causal, so that all have the same work.

A row of two sequences, 2 and 5 tokens, on a tensor-parallel size of 4; the last token of the one and the last two of the other are trained:

    tokens     [ 4 5 | 7 1 8 2 9 | 0 ]   lengths [2, 5, 1]: in order of length, then padding to a multiple of 4, a sequence of its own
    positions  [ 0 1 | 0 1 2 3 4 | 0 ]
    rows       [ 0 | 4 5 ]               the logits at a position predict the next token of its sequence
    labels     [ 5 | 2 9 ]
    sample     [ 0 | 1 1 ]
    trained    where in `Batch.tokens` each label came from
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from slime.types import NOT_RECORDED, Batch


@dataclass(frozen=True)
class MicroBatch:
    """A rank's share of one packed row: L tokens (all of the row's without context parallelism), t of which predict a trained one."""

    tokens: np.ndarray  # int64 [L]
    positions: np.ndarray  # int64 [L], within the sequence
    lengths: list[int]  # of the sequences, which cover the row of all its ranks
    rows: np.ndarray  # int64 [t], ascending: where in the share the logits of each trained token lie
    labels: np.ndarray  # int64 [t], the trained tokens
    sample: np.ndarray  # int64 [t], which sequence of the row each belongs to
    trained: np.ndarray  # int64 [t], position of each in the batch
    source: np.ndarray  # int64 [L], position of each token in the batch; -1: padding
    experts: np.ndarray | None  # int16 [L, layers, k], see `Batch.experts`


def partition(lengths: np.ndarray, ranks: int, budget: int, quadratic_at: int, multiple: int = 1) -> list[list[np.ndarray]]:
    """Divide sequences (lengths int [N]) into micro-batches: [rank][micro-batch] -> int64 indices, ascending length.

    Every sequence lies in exactly one micro-batch; one holds at most `budget` tokens, or a single longer sequence; every rank has the
    same number of micro-batches, the least multiple of `multiple` for which the heuristic finds room (some may be empty). Work is balanced
    over micro-batches and ranks, a sequence of n tokens costing n * (1 + n / quadratic_at). The plan depends on the arguments alone.
    """
    assert len(lengths) and lengths.min() > 0 and budget > 0, (len(lengths), budget)
    cost = lengths * (1.0 + lengths / quadratic_at)
    heavy_first = np.lexsort((np.arange(len(lengths)), -lengths))
    count = -(-max(1, -(-int(np.minimum(lengths, budget).sum()) // (ranks * budget))) // multiple) * multiple
    while (bins := _fill(lengths, cost, heavy_first, ranks * count, budget)) is None:
        count += multiple
    return [[_by_length(bins[b], lengths) for b in mine] for mine in _deal(bins, cost, ranks)]


def partition_apart(
    lengths: np.ndarray, apart: np.ndarray, ranks: int, budget: int, quadratic_at: int, anywhere: bool
) -> list[list[np.ndarray]]:
    """`partition` of every group of sequences by itself (apart int64 [N], which one each belongs to): what shares a micro-batch depends on
    its group alone, whatever other groups there are. As many micro-batches on every rank.

    `anywhere`: whichever rank is free takes one. Otherwise those of a group lie side by side on all ranks, which may look at one another.
    """
    cost = lengths * (1.0 + lengths / quadratic_at)
    groups = [np.flatnonzero(apart == number) for number in np.unique(apart)]
    plans = [[[at[b] for b in mine] for mine in partition(lengths[at], ranks, budget, quadratic_at)] for at in groups]
    if not anywhere:
        return [[b for plan in plans for b in plan[rank]] for rank in range(ranks)]
    rows = [b for plan in plans for mine in plan for b in mine if len(b)]
    rows += [np.zeros(0, np.int64)] * (-len(rows) % ranks)
    return [[rows[b] for b in mine] for mine in _deal(rows, cost, ranks)]


def _fill(lengths: np.ndarray, cost: np.ndarray, order: np.ndarray, bins: int, budget: int) -> list[list[int]] | None:
    """Longest first, each sequence into the cheapest of the bins that have room; None where one finds no room."""
    tokens, costs = np.zeros(bins, np.int64), np.zeros(bins)
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        room = (tokens + lengths[i] <= budget) | (tokens == 0)
        if not room.any():
            return None
        chosen = int(np.argmin(np.where(room, costs, np.inf)))
        filled[chosen].append(int(i))
        tokens[chosen] += lengths[i]
        costs[chosen] += cost[i]
    return filled


def _deal(bins: Sequence[list[int] | np.ndarray], cost: np.ndarray, ranks: int) -> list[list[int]]:
    """Which bins each rank computes: equally many, the dearest first, each to the rank with the least work so far."""
    costs = np.array([cost[b].sum() for b in bins])
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    work = np.zeros(ranks)
    for b in np.argsort(-costs, kind="stable"):
        free = np.array([len(mine) < len(bins) // ranks for mine in dealt])
        rank = int(np.argmin(np.where(free, work, np.inf)))
        dealt[rank].append(int(b))
        work[rank] += costs[b]
    return dealt


def _by_length(samples: list[int], lengths: np.ndarray) -> np.ndarray:
    chosen = np.array(sorted(samples), np.int64)
    return chosen[np.argsort(lengths[chosen], kind="stable")]


def padded_lengths(lengths: np.ndarray, cp_size: int) -> np.ndarray:
    """Lengths of sequences (int [N]) in rows that cp_size ranks share."""
    chunks = 1 if cp_size == 1 else 2 * cp_size
    return -(-lengths // chunks) * chunks


def pack(batch: Batch, samples: np.ndarray, multiple: int, cp_rank: int = 0, cp_size: int = 1, length: int = 0) -> MicroBatch:
    """Rank cp_rank's share of the packed row of these samples (int64 [n]), its length a multiple of `multiple` and at least `length`;
    padding is a last sequence of its own, and the end of each sequence where several ranks share the row.

    No samples at all give a row of padding, from which nothing is trained.
    """
    assert not batch.loss_mask[batch.cu_seqlens[:-1]].any(), "the first token of a sequence has no context to be trained from"
    spans = [np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in samples]
    lengths = [int(n) for n in padded_lengths(np.array([len(span) for span in spans], np.int64), cp_size)]
    unit = multiple if cp_size == 1 else lcm(2 * cp_size, cp_size * multiple)
    padding = -(-max(sum(lengths), length * cp_size, 1) // unit) * unit - sum(lengths)
    lengths += [padding] if padding else []
    source = [np.pad(span, (0, length - len(span)), constant_values=-1) for span, length in zip(spans, lengths, strict=False)]
    source += [np.full(padding, -1)] if padding else []
    row = np.concatenate([source_of[share(len(source_of), cp_rank, cp_size)] for source_of in source])
    positions = np.concatenate([share(length, cp_rank, cp_size) for length in lengths])
    sample = np.repeat(np.arange(len(lengths)), [length // cp_size for length in lengths])
    ends = np.array([span[-1] for span in spans] + [-1] * bool(padding), np.int64)[sample]  # last token of each one's sequence
    predicts = (row >= 0) & (row != ends)
    rows = np.flatnonzero(predicts)
    rows = rows[batch.loss_mask[row[rows] + 1]]
    trained = row[rows] + 1
    return MicroBatch(
        tokens=np.where(row >= 0, batch.tokens[np.maximum(row, 0)], 0).astype(np.int64),
        positions=positions,
        lengths=lengths,
        rows=rows,
        labels=batch.tokens[trained].astype(np.int64),
        sample=sample[rows],
        trained=trained,
        source=row,
        experts=None if batch.experts is None else np.where((row >= 0)[:, None, None], batch.experts[row], np.int16(NOT_RECORDED)),
    )


def share(length: int, cp_rank: int, cp_size: int) -> np.ndarray:
    """int64 [length / cp_size], positions of a sequence that a rank holds: a chunk from the front and its counterpart from the back."""
    if cp_size == 1:
        return np.arange(length)
    chunk = length // (2 * cp_size)
    front = np.arange(cp_rank * chunk, (cp_rank + 1) * chunk)
    return np.concatenate([front, length - front[::-1] - 1])


def updates_of(batch: Batch, parts: int) -> list[np.ndarray]:
    """The samples of each optimizer step, see `split_groups`. Raises ValueError where nothing is trained in one of them: momentum and
    weight decay would move the weights all the same. Rollouts drop groups of which nothing is trained: such a batch is from elsewhere."""
    split = split_groups(batch.group, parts)
    trained_N = batch.trained_lengths
    for number, samples in enumerate(split, 1):
        if not trained_N[samples].any():
            raise ValueError(
                f"optimizer step {number} of {parts} has {len(samples)} samples and no token that is trained: momentum and weight decay "
                "alone would move the weights; lower trainer.updates_per_batch, or leave groups without a trained token out of the batch"
            )
    return split


def split_groups(group: np.ndarray, parts: int) -> list[np.ndarray]:
    """Divide samples (group int64 [N]) into `parts` of whole groups, in order of first appearance: int64 positions, ascending.

    Raises ValueError where there are fewer groups than parts.
    """
    ids, first = np.unique(group, return_index=True)
    if len(ids) < parts:
        raise ValueError(f"a batch of {len(ids)} groups cannot be divided into {parts} updates: lower trainer.updates_per_batch")
    in_order = ids[np.argsort(first)]
    return [np.flatnonzero(np.isin(group, chosen)) for chosen in np.array_split(in_order, parts)]
