"""Rows of logits and what a loss wants to know of them, on this rank's share of the vocabulary alone; sums over ranks are the caller's.

Everywhere below:

    logits, teacher     [L, V] and [M, V], any float dtype; ids 0 to `real` are looked at, the rest is padding
    rows, teacher_rows  int64 [t], distinct rows of each
    labels              int64 [t], ids of this rank's; others lie outside [0, real)
    x                   logits / temperature, in fp32

In Triton a row is read once and nothing in fp32 is written (`vocabulary_programs`), in torch a chunk of rows at a time is
(`vocabulary_chunks`).
"""

import torch
from torch import Tensor

from slime.trainer.kernels import on_triton, vocabulary_chunks

BLOCK = 4096
WARPS = 8


def token_sums(logits: Tensor, rows: Tensor, labels: Tensor, temperature: float, real: int) -> tuple[Tensor, Tensor]:
    """(top [t], sums [3, t]), fp32: the largest x of a row (-1e30 where there is none); the sums of exp(x - top) and of
    (x - top) exp(x - top); and x - top of the label, 0 where that is another rank's."""
    if not on_triton(logits.device):
        return vocabulary_chunks.token_sums(logits, rows, labels, temperature, real)
    from slime.trainer.kernels import vocabulary_programs as programs

    count = len(rows)
    top, sums = (torch.empty(*shape, count, dtype=torch.float32, device=logits.device) for shape in ((), (3,)))
    if count:
        numbers = (logits, logits.stride(0), rows, labels, top, sums, count, real, float(temperature))
        programs.token_sums[(count,)](*numbers, BLOCK=BLOCK, num_warps=WARPS)
    return top, sums


def token_gradient(
    logits: Tensor,
    rows: Tensor,
    labels: Tensor,
    temperature: float,
    real: int,
    log_z: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
) -> Tensor:
    """d_logits [L, V], from the gradients of log-probs and entropy (fp32 [t]; None: of nothing). `log_z` and `entropy` are fp32 [t]."""
    if not on_triton(logits.device):
        return vocabulary_chunks.token_gradient(logits, rows, labels, temperature, real, log_z, entropy, d_logprobs, d_entropy)
    from slime.trainer.kernels import vocabulary_programs as programs

    d_logits, count = torch.zeros_like(logits), len(rows)
    none = torch.zeros_like(log_z)
    slopes = [none if slope is None else slope.contiguous() for slope in (d_logprobs, d_entropy)]
    if count and real:
        numbers = (logits, logits.stride(0), rows, labels, log_z, entropy, *slopes, d_logits, real, float(temperature))
        programs.token_gradient[(count, -(-real // BLOCK))](*numbers, BLOCK=BLOCK, num_warps=WARPS)
    return d_logits


def divergence_sums(
    logits: Tensor,
    teacher: Tensor,
    rows: Tensor,
    teacher_rows: Tensor,
    temperature: float,
    real: int,
    log_z: Tensor,
    teacher_log_z: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    """fp32 [1, t]: sum s (log s - log q) ("reverse") or sum q (log q - log s) ("forward"), of student and teacher; for "jsd" [2, t]: the
    KL of each of s and q from beta q + (1 - beta) s."""
    if not on_triton(logits.device):
        return vocabulary_chunks.divergence_sums(logits, teacher, rows, teacher_rows, temperature, real, log_z, teacher_log_z, kind, beta)
    from slime.trainer.kernels import vocabulary_programs as programs

    count = len(rows)
    sums = torch.empty(2 if kind == "jsd" else 1, count, dtype=torch.float32, device=logits.device)
    if count:
        tensors = (logits, teacher, logits.stride(0), teacher.stride(0), rows, teacher_rows, log_z, teacher_log_z, sums)
        numbers = (count, real, float(temperature))
        programs.divergence_sums[(count,)](*tensors, *numbers, KIND=kind, BETA=beta, BLOCK=BLOCK // 2, num_warps=WARPS)
    return sums


def divergence_gradient(
    logits: Tensor,
    teacher: Tensor,
    rows: Tensor,
    teacher_rows: Tensor,
    temperature: float,
    real: int,
    log_z: Tensor,
    teacher_log_z: Tensor,
    of_student: Tensor,
    d_found: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    """d_logits [L, V]. `of_student` is the first of `divergence_sums` over all ranks."""
    tensors = (logits, teacher, rows, teacher_rows)
    known = (log_z, teacher_log_z, of_student, d_found)
    if not on_triton(logits.device):
        return vocabulary_chunks.divergence_gradient(*tensors, temperature, real, *known, kind, beta)
    from slime.trainer.kernels import vocabulary_programs as programs

    d_logits, count = torch.zeros_like(logits), len(rows)
    if count and real:
        strided = (logits, teacher, logits.stride(0), teacher.stride(0), rows, teacher_rows, *(x.contiguous() for x in known))
        grid = (count, -(-real // (BLOCK // 2)))
        numbers = (d_logits, real, float(temperature))
        programs.divergence_gradient[grid](*strided, *numbers, KIND=kind, BETA=beta, BLOCK=BLOCK // 2, num_warps=WARPS)
    return d_logits
