"""Log-probabilities and entropy from logits whose vocabulary is split over tensor-parallel ranks.

Logits stay in the model's dtype; what of them lives in fp32 at a time, and for how long, is said in `slime.trainer.kernels.vocabulary`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.trainer.kernels import vocabulary


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
        ctx.real, local = local_ids(logits, vocab_size, group), labels - group.rank() * logits.shape[1]
        sums, log_z = reduced(logits, rows, local, temperature, ctx.real, group)
        entropy = sums[0].log() - sums[1] / sums[0]
        ctx.save_for_backward(logits, rows, local, entropy, log_z)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return sums[2] - sums[0].log(), entropy

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, labels, entropy, log_z = ctx.saved_tensors
        known = (log_z, entropy, d_logprobs, d_entropy)
        return vocabulary.token_gradient(logits, rows, labels, ctx.temperature, ctx.real, *known), None, None, None, None, None


def local_ids(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> int:
    """How many of this rank's ids are not padding."""
    width = logits.shape[1]
    return max(0, min(width, vocab_size - group.rank() * width))


def reduced(logits: Tensor, rows: Tensor, labels: Tensor, temperature: float, real: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(sums [3, t], log Z [t]), fp32, over the whole vocabulary: the sums of `vocabulary.token_sums` with the largest x of all ranks."""
    top, sums = vocabulary.token_sums(logits, rows, labels, temperature, real)
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    held, shift = (labels >= 0) & (labels < real), top - highest
    weight = shift.exp()
    sums = torch.stack([weight * sums[0], weight * (sums[1] + shift * sums[0]), torch.where(held, sums[2] + shift, 0.0)])
    dist.all_reduce(sums, group=group)
    return sums, sums[0].log() + highest
