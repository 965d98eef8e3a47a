"""The divergence of a student from a teacher over the whole vocabulary, which is split over tensor-parallel ranks in the same way for both:
nobody's logits are gathered. As in `logprobs`, fp32 logits of a chunk of rows are all that ever lives."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.trainer.logprobs import chunks, put, scaled, scratch


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
        arrays = scratch(logits, len(rows), 2 * width, real, 4)
        for part in chunks(len(rows), 2 * width):
            x = scaled(logits, rows[part], arrays[0], temperature)
            y = scaled(teacher, teacher_rows[part], arrays[1], temperature)
            spare = [array[: len(x)] for array in arrays[2:]]
            log_z[part], log_z_teacher[part] = _log_z(x, spare[0], group), _log_z(y, spare[0], group)
            x.sub_(log_z[part, None])
            y.sub_(log_z_teacher[part, None])
            found[part], of_student[part] = _reduce(x, y, spare, kind, beta, group)
        ctx.save_for_backward(logits, teacher, rows, teacher_rows, of_student, log_z, log_z_teacher)
        ctx.temperature, ctx.real, ctx.kind, ctx.beta = temperature, real, kind, beta
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        logits, teacher, rows, teacher_rows, of_student, log_z, log_z_teacher = ctx.saved_tensors
        d_logits = torch.zeros_like(logits)
        arrays = scratch(logits, len(rows), 2 * logits.shape[1], ctx.real, 4)
        for part in chunks(len(rows), 2 * logits.shape[1]):
            x = scaled(logits, rows[part], arrays[0], ctx.temperature).sub_(log_z[part, None])
            y = scaled(teacher, teacher_rows[part], arrays[1], ctx.temperature).sub_(log_z_teacher[part, None])
            d_x = _slope(x, y, [array[: len(x)] for array in arrays[2:]], of_student[part, None], ctx.kind, ctx.beta)
            put(d_logits, rows[part], d_x.mul_(d_found[part, None] / ctx.temperature))
        return d_logits, None, None, None, None, None, None, None, None


# Below, x and y are log-probabilities of the local ids under student and teacher, [c, v]; with the arrays of `spare`, as large, they are
# written over.


def _log_z(x: Tensor, spare: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log sum exp over all ranks' columns, [c]; x is left as it is."""
    top = x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = torch.sub(x, top[:, None], out=spare).exp_().sum(1)
    dist.all_reduce(total, group=group)
    return total.log() + top


def _reduce(x: Tensor, y: Tensor, spare: list[Tensor], kind: str, beta: float, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(D, the divergence of the student's own that its gradient needs), [c] each."""
    if kind == "jsd":
        middle = _middle(x, y, spare, beta)
        sums = torch.stack([_kl(x, middle, spare[1]), _kl(y, middle, spare[1])])
    else:
        sums = (_kl(y, x, spare[0]) if kind == "forward" else _kl(x, y, spare[0]))[None]
    dist.all_reduce(sums, group=group)
    return (sums[0] if kind != "jsd" else beta * sums[1] + (1 - beta) * sums[0]), sums[0]


def _slope(x: Tensor, y: Tensor, spare: list[Tensor], of_student: Tensor, kind: str, beta: float) -> Tensor:
    """dD / dx [c, v]."""
    if kind == "forward":
        return x.exp_().sub_(y.exp_())
    other = y if kind == "reverse" else _middle(x, y, spare, beta)
    slope = torch.exp(x, out=spare[1]).mul_(x.sub_(other).sub_(of_student))
    return slope if kind == "reverse" else slope.mul_(1 - beta)


def _kl(p: Tensor, q: Tensor, spare: Tensor) -> Tensor:
    """sum p (log p - log q) over the local ids, [c]; p is written over."""
    return torch.exp(p, out=spare).mul_(p.sub_(q)).sum(1)


def _middle(x: Tensor, y: Tensor, spare: list[Tensor], beta: float) -> Tensor:
    """log (beta q + (1 - beta) s), in the first of `spare`; x and y are left as they are."""
    of_teacher, of_student = torch.add(y, math.log(beta), out=spare[0]), torch.add(x, math.log1p(-beta), out=spare[1])
    return torch.logaddexp(of_teacher, of_student, out=spare[0])
