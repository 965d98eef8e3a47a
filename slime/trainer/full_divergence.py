"""The divergence of a student from a teacher over the whole vocabulary, which is split over tensor-parallel ranks in the same way for both:
nobody's logits are gathered, and nobody's whole in fp32 (`slime.trainer.kernels.vocabulary`)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.trainer.kernels import vocabulary
from slime.trainer.logprobs import local_ids, reduced


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
        real = local_ids(logits, vocab_size, group)
        nowhere = torch.full_like(rows, -1)
        _, log_z = reduced(logits, rows, nowhere, temperature, real, group)
        _, teacher_log_z = reduced(teacher, teacher_rows, nowhere, temperature, real, group)
        tensors = (logits, teacher, rows, teacher_rows)
        sums = vocabulary.divergence_sums(*tensors, temperature, real, log_z, teacher_log_z, kind, beta)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(*tensors, log_z, teacher_log_z, sums[0])
        ctx.temperature, ctx.real, ctx.kind, ctx.beta = temperature, real, kind, beta
        return beta * sums[1] + (1 - beta) * sums[0] if kind == "jsd" else sums[0].clone()

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        logits, teacher, rows, teacher_rows, log_z, teacher_log_z, of_student = ctx.saved_tensors
        known = (log_z, teacher_log_z, of_student, d_found)
        d_logits = vocabulary.divergence_gradient(
            logits, teacher, rows, teacher_rows, ctx.temperature, ctx.real, *known, ctx.kind, ctx.beta
        )
        return d_logits, None, None, None, None, None, None, None, None
