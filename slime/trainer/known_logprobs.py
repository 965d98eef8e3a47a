"""A student's log-probabilities of the tokens that a teacher names, and of all others together, from logits whose vocabulary is split over
tensor-parallel ranks. As in `logprobs`, fp32 logits of a chunk of rows are all that ever lives."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slime.trainer.kernels.vocabulary_chunks import chunks, put, scaled, scratch


def known_logprobs(logits: Tensor, rows: Tensor, ids: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """fp32 [t, k + 1]: log p of each of `ids`, then log of 1 - their sum, of softmax(logits / temperature) over the first `vocab_size` ids.

    logits   [L, V / tp], this rank's share of the (padded) vocabulary, rank 0's ids first; any float dtype
    rows     int64 [t], distinct rows of logits          ids   int64 [t, k], distinct in a row, global, below vocab_size; k < vocab_size
    group    the tensor-parallel ranks; all of them call this together and get the same result

    The last column is summed over the other ids: a difference from 1 would have no digits left where it is small. With p = softmax(x), S
    the ids and r the sum of the others:  d log p_i / dx_j = [i = j] - p_j,   d log r / dx_j = [j not in S] p_j / r - p_j.
    """
    return _KnownLogprobs.apply(logits, rows, ids, temperature, vocab_size, group)


@torch.no_grad()
def top_ids(logits: Tensor, rows: Tensor, k: int, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """int64 [t, k], the k likeliest of the first `vocab_size` ids at each of `rows`; arguments as above."""
    width, ranks = logits.shape[1], group.size()
    offset = group.rank() * width
    real = max(0, min(width, vocab_size - offset))
    found = torch.empty(len(rows), k, dtype=torch.int64, device=logits.device)
    (array,) = scratch(logits, len(rows), width, real, 1)
    for part in chunks(len(rows), width):
        x = scaled(logits, rows[part], array, 1.0)
        missing = max(0, k - real)
        values, ids = x.topk(min(k, real), 1)
        values = F.pad(values, (0, missing), value=-torch.inf).contiguous()
        ids = F.pad(ids + offset, (0, missing)).contiguous()
        every_value, every_id = values.new_empty(ranks, *values.shape), ids.new_empty(ranks, *ids.shape)
        dist.all_gather_into_tensor(every_value.view(-1), values.view(-1), group=group)
        dist.all_gather_into_tensor(every_id.view(-1), ids.view(-1), group=group)
        best = every_value.transpose(0, 1).flatten(1).topk(k, 1).indices
        found[part] = every_id.transpose(0, 1).flatten(1).gather(1, best)
    return found


class _KnownLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, ids: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup
    ) -> Tensor:
        width = logits.shape[1]
        offset = group.rank() * width
        real = max(0, min(width, vocab_size - offset))  # local ids that are not padding
        known = torch.empty(len(rows), ids.shape[1] + 1, dtype=torch.float32, device=logits.device)
        log_z = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        (array,) = scratch(logits, len(rows), width, real, 1)
        for part in chunks(len(rows), width):
            known[part], log_z[part] = _reduce(scaled(logits, rows[part], array, temperature), ids[part] - offset, group)
        ctx.save_for_backward(logits, rows, ids, known, log_z)
        ctx.temperature, ctx.offset, ctx.real = temperature, offset, real
        return known

    @staticmethod
    def backward(ctx: Any, d_known: Tensor) -> tuple[Tensor | None, ...]:
        logits, rows, ids, known, log_z = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        array, other = scratch(logits, len(rows), logits.shape[1], ctx.real, 2)
        for part in chunks(len(rows), logits.shape[1]):
            logp = scaled(logits, rows[part], array, ctx.temperature).sub_(log_z[part, None])
            slope = d_known[part] / ctx.temperature
            d_x = torch.sub(logp, known[part, -1:], out=other[: len(logp)])
            d_x.clamp_(max=0.0).exp_().mul_(slope[:, -1:])  # as if no id were known
            row, column, at = _held(ids[part] - ctx.offset, ctx.real)
            d_x[row, column] = slope[row, at]
            put(d_logits, rows[part], d_x.addcmul_(logp.exp_(), slope.sum(1, keepdim=True), value=-1))
        return d_logits, None, None, None, None, None


def _held(ids: Tensor, real: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, local id, which of the row's k) of the ids that this rank holds."""
    row, at = ((ids >= 0) & (ids < real)).nonzero(as_tuple=True)
    return row, ids[row, at], at


def _reduce(x: Tensor, ids: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """([c, k + 1] as above, log Z [c]), from local scaled logits x [c, v] and local ids [c, k], which may lie on other ranks. Writes over
    x."""
    row, column, at = _held(ids, x.shape[1])
    of_ids = x.new_zeros(ids.shape)
    of_ids[row, at] = x[row, column]
    dist.all_reduce(of_ids, group=group)
    x[row, column] = -torch.inf
    top = x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    others = x.sub_(top[:, None]).exp_().sum(1)
    dist.all_reduce(others, group=group)
    log_others = others.log() + top
    log_z = torch.logsumexp(torch.cat([of_ids, log_others[:, None]], 1), 1)
    return torch.cat([of_ids, log_others[:, None]], 1) - log_z[:, None], log_z
