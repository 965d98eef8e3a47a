"""Log-probabilities and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Logits stay in the model's dtype. A chunk of rows at a time is computed in fp32, and once more in the backward pass, so that fp32 logits
of a chunk are all that ever lives.
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
        for part in chunks(len(rows), width):
            x, y = scaled(logits, rows[part], real, temperature), labels[part] - offset
            logprobs[part], entropy[part], log_z[part] = _reduce(x, y, group)
        ctx.save_for_backward(logits, rows, labels, entropy, log_z)
        ctx.temperature, ctx.offset, ctx.real = temperature, offset, real
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, labels, entropy, log_z = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        for part in chunks(len(rows), logits.shape[1]):
            x, y = scaled(logits, rows[part], ctx.real, ctx.temperature), labels[part] - ctx.offset
            logp = x.sub_(log_z[part, None])
            p = logp.exp()
            d_x = torch.zeros_like(p)
            if d_logprobs is not None:
                d_x.addcmul_(p, d_logprobs[part, None], value=-1)
                held = (y >= 0) & (y < ctx.real)
                d_x[held, y[held]] += d_logprobs[part][held]
            if d_entropy is not None:
                d_x.addcmul_(p * (logp + entropy[part, None]), d_entropy[part, None], value=-1)
            d_logits[rows[part], : ctx.real] = (d_x / ctx.temperature).to(logits.dtype)
        return d_logits, None, None, None, None, None


def chunks(count: int, width: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def scaled(logits: Tensor, rows: Tensor, real: int, temperature: float) -> Tensor:
    """fp32 [c, real], a new tensor."""
    return logits[rows, :real].to(torch.float32).div_(temperature)


def _reduce(x: Tensor, y: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), entropy, log Z), each [c], from local scaled logits x [c, v] and local labels y [c], which may lie on another rank."""
    count, real = x.shape
    top = x.amax(1) if real else x.new_full((count,), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    x = x - top[:, None]
    held = (y >= 0) & (y < real)
    sums = x.new_zeros(3, count)  # of exp(x), of x exp(x), and x at the label
    exp = x.exp()
    sums[0] = exp.sum(1)
    sums[1] = exp.mul_(x).sum(1)
    sums[2, held] = x[held, y[held]]
    dist.all_reduce(sums, group=group)
    log_z = sums[0].log()
    return sums[2] - log_z, log_z - sums[1] / sums[0], log_z + top
