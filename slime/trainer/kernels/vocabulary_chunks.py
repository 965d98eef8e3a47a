"""`vocabulary` in torch: a chunk of rows at a time is computed in fp32, in arrays that all chunks share."""

import math

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MiB in fp32
LOWEST = -1e30


def token_sums(logits: Tensor, rows: Tensor, labels: Tensor, temperature: float, real: int) -> tuple[Tensor, Tensor]:
    """See `vocabulary.token_sums`."""
    top, sums = (torch.empty(*shape, len(rows), dtype=torch.float32, device=logits.device) for shape in ((), (3,)))
    array, other = scratch(logits, len(rows), logits.shape[1], real, 2)
    for part in chunks(len(rows), logits.shape[1]):
        x, y = scaled(logits, rows[part], array, temperature), labels[part]
        top[part] = x.amax(1) if real else LOWEST
        x.sub_(top[part, None])
        held = (y >= 0) & (y < real)
        of_label = x.new_zeros(len(x))
        of_label[held] = x[held, y[held]]
        exp = torch.exp(x, out=other[: len(x)])
        sums[0, part] = exp.sum(1)
        sums[1, part] = exp.mul_(x).sum(1)
        sums[2, part] = of_label
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
    """See `vocabulary.token_gradient`."""
    d_logits = torch.zeros_like(logits)
    array, other = scratch(logits, len(rows), logits.shape[1], real, 2)
    for part in chunks(len(rows), logits.shape[1]):
        x, y = scaled(logits, rows[part], array, temperature), labels[part]
        logp = x.sub_(log_z[part, None])
        d_x = torch.exp(logp, out=other[: len(x)])  # p, and then p_j times what stands beside it
        of_label = None if d_logprobs is None else d_logprobs[part, None] / temperature
        if d_entropy is not None:
            slope = logp.add_(entropy[part, None]).mul_(-d_entropy[part, None] / temperature)
            d_x.mul_(slope if of_label is None else slope.sub_(of_label))
        elif of_label is not None:
            d_x.mul_(-of_label)
        if of_label is not None:
            held = (y >= 0) & (y < real)
            d_x[held, y[held]] += of_label[held, 0]
        put(d_logits, rows[part], d_x)
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
    """See `vocabulary.divergence_sums`."""
    sums = torch.empty(2 if kind == "jsd" else 1, len(rows), dtype=torch.float32, device=logits.device)
    arrays = scratch(logits, len(rows), 2 * logits.shape[1], real, 4)
    for part in chunks(len(rows), 2 * logits.shape[1]):
        x = scaled(logits, rows[part], arrays[0], temperature).sub_(log_z[part, None])
        y = scaled(teacher, teacher_rows[part], arrays[1], temperature).sub_(teacher_log_z[part, None])
        spare = [array[: len(x)] for array in arrays[2:]]
        if kind == "jsd":
            middle = _middle(x, y, spare, beta)
            sums[0, part], sums[1, part] = _kl(x, middle, spare[1]), _kl(y, middle, spare[1])
        else:
            sums[0, part] = _kl(y, x, spare[0]) if kind == "forward" else _kl(x, y, spare[0])
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
    """See `vocabulary.divergence_gradient`."""
    d_logits = torch.zeros_like(logits)
    arrays = scratch(logits, len(rows), 2 * logits.shape[1], real, 4)
    for part in chunks(len(rows), 2 * logits.shape[1]):
        x = scaled(logits, rows[part], arrays[0], temperature).sub_(log_z[part, None])
        y = scaled(teacher, teacher_rows[part], arrays[1], temperature).sub_(teacher_log_z[part, None])
        d_x = _slope(x, y, [array[: len(x)] for array in arrays[2:]], of_student[part, None], kind, beta)
        put(d_logits, rows[part], d_x.mul_(d_found[part, None] / temperature))
    return d_logits


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


# Below, x and y are log-probabilities of the local ids under student and teacher, [c, v]; with the arrays of `spare`, as large, they are
# written over.


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
