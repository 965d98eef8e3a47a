"""Log-probabilities and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Logits stay in the model's dtype. A chunk of rows at a time is computed in fp32, and once more in the backward pass, in two arrays that all
chunks share: fp32 logits of a chunk are all that ever lives.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # local logits of a chunk: 64 MiB in fp32


def token_logprobs(
    logits: Tensor, rows: Tensor, labels: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(log p(label), entropy), both fp32 [t], of softmax(logits / temperature) over the first `vocab_size` ids.

    logits   [L, V / tp], this rank's share of the (padded) vocabulary, rank 0's ids first; any float dtype
    rows     int64 [t], distinct rows of logits          labels   int64 [t], global ids below vocab_size
    group    the tensor-parallel ranks; all of them call this together and get the same result

    Ids at and above vocab_size are padding: they have no probability and no gradient. With x = logits / temperature, p = softmax(x),
    H = -sum p log p:  d log p(y) / dx_j = [j = y] - p_j,   dH / dx_j = -p_j (log p_j + H).
    """
    return _TokenLogprobs.apply(logits, rows, labels, temperature, vocab_size, group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, labels: Tensor, temperature: float, vocab_size: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        width = logits.shape[1]
        offset = group.rank() * width
        real = max(0, min(width, vocab_size - offset))  # local ids that are not padding
        logprobs, entropy, log_z = (torch.empty(len(rows), dtype=torch.float32, device=logits.device) for _ in range(3))
        array, other = scratch(logits, len(rows), width, real, 2)
        for part in chunks(len(rows), width):
            x = scaled(logits, rows[part], array, temperature)
            logprobs[part], entropy[part], log_z[part] = _reduce(x, other[: len(x)], labels[part] - offset, group)
        ctx.save_for_backward(logits, rows, labels, entropy, log_z)
        ctx.temperature, ctx.offset, ctx.real = temperature, offset, real
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, labels, entropy, log_z = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        array, other = scratch(logits, len(rows), logits.shape[1], ctx.real, 2)
        for part in chunks(len(rows), logits.shape[1]):
            x, y = scaled(logits, rows[part], array, ctx.temperature), labels[part] - ctx.offset
            logp = x.sub_(log_z[part, None])
            d_x = torch.exp(logp, out=other[: len(x)])  # p, and then p_j times what stands beside it
            of_label = None if d_logprobs is None else d_logprobs[part, None] / ctx.temperature
            if d_entropy is not None:
                slope = logp.add_(entropy[part, None]).mul_(-d_entropy[part, None] / ctx.temperature)
                d_x.mul_(slope if of_label is None else slope.sub_(of_label))
            elif of_label is not None:
                d_x.mul_(-of_label)
            if of_label is not None:
                held = (y >= 0) & (y < ctx.real)
                d_x[held, y[held]] += of_label[held, 0]
            put(d_logits, rows[part], d_x)
        return d_logits, None, None, None, None, None


def chunks(count: int, width: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def scratch(logits: Tensor, count: int, width: int, real: int, arrays: int) -> list[Tensor]:
    """fp32 [rows of a chunk, real] each, for all chunks of `chunks(count, width)`: on a CPU a fresh one costs more than what is computed in
    it."""
    size = min(count, max(1, CHUNK_ELEMENTS // width))
    return [torch.empty(size, real, dtype=torch.float32, device=logits.device) for _ in range(arrays)]


def scaled(logits: Tensor, rows: Tensor, array: Tensor, temperature: float) -> Tensor:
    """logits of these rows and of the ids that `array` has columns for, over the temperature: fp32 [c, real], in the array's memory."""
    x = array[: len(rows)].copy_(logits[:, : array.shape[1]].index_select(0, rows))
    return x if temperature == 1.0 else x.div_(temperature)


def put(d_logits: Tensor, rows: Tensor, d_x: Tensor) -> None:
    """Write a chunk's gradient [c, real] where it belongs."""
    d_logits[:, : d_x.shape[1]].index_copy_(0, rows, d_x.to(d_logits.dtype))


def _reduce(x: Tensor, other: Tensor, y: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), entropy, log Z), each [c], from local scaled logits x [c, v] and local labels y [c], which may lie on another rank. Writes
    over x and `other`, which is as large."""
    count, real = x.shape
    top = x.amax(1) if real else x.new_full((count,), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    x.sub_(top[:, None])
    held = (y >= 0) & (y < real)
    sums = x.new_zeros(3, count)  # of exp(x), of x exp(x), and x at the label
    exp = torch.exp(x, out=other)
    sums[0] = exp.sum(1)
    sums[1] = exp.mul_(x).sum(1)
    sums[2, held] = x[held, y[held]]
    dist.all_reduce(sums, group=group)
    log_z = sums[0].log()
    return sums[2] - log_z, log_z - sums[1] / sums[0], log_z + top
