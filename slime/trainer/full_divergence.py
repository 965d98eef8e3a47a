"""The divergence of a student from a teacher over the whole vocabulary, which is split over tensor-parallel ranks in the same way for both:
nobody's logits are gathered. As in `logprobs`, fp32 logits of a chunk of rows are all that ever lives."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.trainer.logprobs import chunks, scaled


def full_divergence(
    logits: Tensor,
    teacher: Tensor,
    rows: Tensor,
    teacher_rows: Tensor,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    kind: str,
    beta: float,
) -> Tensor:
    """fp32 [t]: what `slime.algorithms.distillation.divergence` says of softmax(logits / temperature) and softmax(teacher / temperature).

    logits, teacher       [L, V / tp] and [M, V / tp], this rank's share of the (padded) vocabulary, rank 0's ids first; any float dtypes
    rows, teacher_rows    int64 [t], distinct rows of each, of the same t tokens
    vocab_size            ids that both know; both are softmaxes over these alone
    group                 the tensor-parallel ranks; all of them call this together and get the same result

    The teacher gets no gradient. With s and q the probabilities of student and teacher, x = logits / temperature, D the result and
    m = beta q + (1 - beta) s:

        reverse   dD / dx_j = s_j (log s_j - log q_j - D)
        forward   dD / dx_j = s_j - q_j
        jsd       dD / dx_j = (1 - beta) s_j (log s_j - log m_j - KL(s || m))
    """
    return _FullDivergence.apply(logits, teacher, rows, teacher_rows, temperature, vocab_size, group, kind, beta)


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor,
        rows: Tensor,
        teacher_rows: Tensor,
        temperature: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        kind: str,
        beta: float,
    ) -> Tensor:
        width = logits.shape[1]
        real = max(0, min(width, vocab_size - group.rank() * width))
        found, of_student, log_z, log_z_teacher = (torch.empty(len(rows), dtype=torch.float32, device=logits.device) for _ in range(4))
        for part in chunks(len(rows), 2 * width):
            x, y = scaled(logits, rows[part], real, temperature), scaled(teacher, teacher_rows[part], real, temperature)
            log_z[part], log_z_teacher[part] = _log_z(x, group), _log_z(y, group)
            x.sub_(log_z[part, None])
            y.sub_(log_z_teacher[part, None])
            found[part], of_student[part] = _reduce(x, y, kind, beta, group)
        ctx.save_for_backward(logits, teacher, rows, teacher_rows, of_student, log_z, log_z_teacher)
        ctx.temperature, ctx.real, ctx.kind, ctx.beta = temperature, real, kind, beta
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        logits, teacher, rows, teacher_rows, of_student, log_z, log_z_teacher = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        for part in chunks(len(rows), 2 * logits.shape[1]):
            x = scaled(logits, rows[part], ctx.real, ctx.temperature)
            y = scaled(teacher, teacher_rows[part], ctx.real, ctx.temperature)
            x.sub_(log_z[part, None])
            y.sub_(log_z_teacher[part, None])
            d_x = _slope(x, y, of_student[part, None], ctx.kind, ctx.beta)
            d_logits[rows[part], : ctx.real] = (d_x * (d_found[part, None] / ctx.temperature)).to(logits.dtype)
        return d_logits, None, None, None, None, None, None, None, None


def _log_z(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log sum exp over all ranks' columns, [c]."""
    top = x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = (x - top[:, None]).exp().sum(1)
    dist.all_reduce(total, group=group)
    return total.log() + top


def _middle(x: Tensor, y: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(y + math.log(beta), x + math.log1p(-beta))


def _reduce(x: Tensor, y: Tensor, kind: str, beta: float, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(D, the divergence of the student's own that its gradient needs), [c] each, from log-probabilities of the local ids."""
    if kind == "forward":
        sums = (y.exp() * (y - x)).sum(1)[None]
    elif kind == "reverse":
        sums = (x.exp() * (x - y)).sum(1)[None]
    else:
        middle = _middle(x, y, beta)
        sums = torch.stack([(x.exp() * (x - middle)).sum(1), (y.exp() * (y - middle)).sum(1)])
    dist.all_reduce(sums, group=group)
    return (sums[0] if kind != "jsd" else beta * sums[1] + (1 - beta) * sums[0]), sums[0]


def _slope(x: Tensor, y: Tensor, of_student: Tensor, kind: str, beta: float) -> Tensor:
    """dD / dx [c, v]."""
    if kind == "forward":
        return x.exp() - y.exp()
    if kind == "reverse":
        return x.exp() * (x - y - of_student)
    return (1 - beta) * x.exp() * (x - _middle(x, y, beta) - of_student)
