"""Which sequences go to which rank and micro-batch, and the packed rows they become. Pure numpy: every rank computes the same plan.

A row of two sequences, 2 and 5 tokens, on a tensor-parallel size of 4; the last token of the one and the last two of the other are trained:

    tokens     [ 4 5 | 7 1 8 2 9 | 0 ]   lengths [2, 5, 1]: in order of length, then padding to a multiple of 4, a sequence of its own
    positions  [ 0 1 | 0 1 2 3 4 | 0 ]
    rows       [ 0 | 4 5 ]               the logits at a position predict the next token of its sequence
    labels     [ 5 | 2 9 ]
    sample     [ 0 | 1 1 ]
    trained    where in `Batch.tokens` each label came from
"""

from dataclasses import dataclass

import numpy as np

from slime.types import Batch


@dataclass(frozen=True)
class MicroBatch:
    """One packed row of L tokens, t of which are predicted and trained."""

    tokens: np.ndarray  # int64 [L]
    positions: np.ndarray  # int64 [L], within the sequence
    lengths: list[int]  # of the sequences, which cover the row
    rows: np.ndarray  # int64 [t], ascending: where in the row the logits of each trained token lie
    labels: np.ndarray  # int64 [t], the trained tokens
    sample: np.ndarray  # int64 [t], which sequence of the row each belongs to
    trained: np.ndarray  # int64 [t], position of each in the batch


def partition(lengths: np.ndarray, ranks: int, budget: int, quadratic_at: int) -> list[list[np.ndarray]]:
    """Divide sequences (lengths int [N]) into micro-batches: [rank][micro-batch] -> int64 indices, ascending length.

    Every sequence lies in exactly one micro-batch; one holds at most `budget` tokens, or a single longer sequence; every rank has the
    same number of micro-batches, the least for which the heuristic finds room (some may be empty). Work is balanced over micro-batches
    and ranks, a sequence of n tokens costing n * (1 + n / quadratic_at). The plan depends on the arguments alone.
    """
    assert len(lengths) and lengths.min() > 0 and budget > 0, (len(lengths), budget)
    cost = lengths * (1.0 + lengths / quadratic_at)
    heavy_first = np.lexsort((np.arange(len(lengths)), -lengths))
    count = max(1, -(-int(np.minimum(lengths, budget).sum()) // (ranks * budget)))
    while (bins := _fill(lengths, cost, heavy_first, ranks * count, budget)) is None:
        count += 1
    return [[_by_length(bins[b], lengths) for b in mine] for mine in _deal(bins, cost, ranks)]


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


def _deal(bins: list[list[int]], cost: np.ndarray, ranks: int) -> list[list[int]]:
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


def pack(batch: Batch, samples: np.ndarray, multiple: int) -> MicroBatch:
    """The packed row of these samples (int64 [n]), its length a multiple of `multiple`; padding is a last sequence of its own.

    No samples at all give a row of padding, from which nothing is trained.
    """
    spans = [np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in samples]
    at = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    lengths = [len(span) for span in spans]
    padding = -len(at) % multiple if len(at) else multiple
    padded = [*lengths, padding] if padding else lengths
    predicted = np.flatnonzero(batch.loss_mask[at])
    assert not batch.loss_mask[batch.cu_seqlens[:-1]].any(), "the first token of a sequence has no context to be trained from"
    return MicroBatch(
        tokens=np.concatenate([batch.tokens[at].astype(np.int64), np.zeros(padding, np.int64)]),
        positions=np.concatenate([np.arange(n) for n in padded]),
        lengths=padded,
        rows=predicted - 1,
        labels=batch.tokens[at][predicted].astype(np.int64),
        sample=np.repeat(np.arange(len(lengths)), lengths)[predicted],
        trained=at[predicted],
    )


def split_groups(group: np.ndarray, parts: int) -> list[np.ndarray]:
    """Divide samples (group int64 [N]) into `parts` of whole groups, in order of first appearance: int64 positions, ascending.

    Raises ValueError where there are fewer groups than parts.
    """
    ids, first = np.unique(group, return_index=True)
    if len(ids) < parts:
        raise ValueError(f"a batch of {len(ids)} groups cannot be divided into {parts} updates: lower trainer.updates_per_batch")
    in_order = ids[np.argsort(first)]
    return [np.flatnonzero(np.isin(group, chosen)) for chosen in np.array_split(in_order, parts)]
