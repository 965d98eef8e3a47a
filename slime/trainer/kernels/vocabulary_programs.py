"""The programs of `vocabulary` in Triton. Imported only where they run: on CUDA, or on the CPU under TRITON_INTERPRET=1.

A program takes one row, in blocks of ids. Nothing in fp32 leaves its registers.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)


@triton.jit
def scaled(row, at, real, temperature):
    """fp32 logits over the temperature of the ids at `at`; -inf from `real` on."""
    return tl.load(row + at, mask=at < real, other=float("-inf")).to(tl.float32) / temperature


@triton.jit
def token_sums(logits, stride, rows, labels, tops, sums, count, real, temperature, BLOCK: tl.constexpr):
    """`vocabulary.token_sums`. A block at a time, with sums relative to the largest logit so far."""
    number = tl.program_id(0)
    row = logits + tl.load(rows + number) * stride
    top = -1e30
    total = 0.0  # of exp(x - top)
    slope = 0.0  # of (x - top) exp(x - top)
    for start in range(0, real, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = scaled(row, at, real, temperature)
        higher = tl.maximum(top, tl.max(x, axis=0))
        shift, kept = top - higher, tl.exp(top - higher)
        x -= higher
        e = tl.exp(x)
        slope = kept * (slope + shift * total) + tl.sum(tl.where(at < real, e * x, 0.0), axis=0)
        total = kept * total + tl.sum(e, axis=0)
        top = higher
    tl.store(tops + number, top)
    tl.store(sums + number, total)
    tl.store(sums + count + number, slope)
    label = tl.load(labels + number)
    held = (label >= 0) & (label < real)
    of_label = tl.load(row + label, mask=held, other=0.0).to(tl.float32) / temperature
    tl.store(sums + 2 * count + number, tl.where(held, of_label - top, 0.0))


@triton.jit
def token_gradient(
    logits, stride, rows, labels, log_z, entropy, d_logprobs, d_entropy, d_logits, real, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """`vocabulary.token_gradient`."""
    number = tl.program_id(0)
    start = tl.load(rows + number) * stride
    label = tl.load(labels + number)
    z = tl.load(log_z + number)
    h = tl.load(entropy + number)
    of_label = tl.load(d_logprobs + number) / temperature
    of_entropy = tl.load(d_entropy + number) / temperature
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logp = scaled(logits + start, at, real, temperature) - z
    p = tl.exp(logp)
    slope = -p * of_label + tl.where(p > 0.0, -p * (logp + h) * of_entropy, 0.0) + tl.where(at == label, of_label, 0.0)
    tl.store(d_logits + start + at, slope.to(d_logits.dtype.element_ty), mask=at < real)


@triton.jit
def mixed(s, q, BETA: tl.constexpr):
    """log (beta exp(q) + (1 - beta) exp(s)) of log-probabilities."""
    top = tl.maximum(s, q)
    safe = tl.maximum(top, LOWEST)
    return safe + tl.log(BETA * tl.exp(q - safe) + (1.0 - BETA) * tl.exp(s - safe))


@triton.jit
def weighed(logp, difference):
    """p times a difference of log-probabilities; 0 where p is."""
    p = tl.exp(logp)
    return tl.where(p > 0.0, p * difference, 0.0)


@triton.jit
def divergence_sums(
    logits, teacher, stride, teacher_stride, rows, teacher_rows, log_z, teacher_log_z, sums, count, real, temperature,
    KIND: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`vocabulary.divergence_sums`."""
    number = tl.program_id(0)
    row = logits + tl.load(rows + number) * stride
    other = teacher + tl.load(teacher_rows + number) * teacher_stride
    z = tl.load(log_z + number)
    teacher_z = tl.load(teacher_log_z + number)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, real, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = scaled(row, at, real, temperature) - z
        q = scaled(other, at, real, temperature) - teacher_z
        if KIND == "forward":
            first += weighed(q, q - s)
        elif KIND == "reverse":
            first += weighed(s, s - q)
        else:
            m = mixed(s, q, BETA)
            first += weighed(s, s - m)
            second += weighed(q, q - m)
    tl.store(sums + number, tl.sum(first, axis=0))
    if KIND == "jsd":
        tl.store(sums + count + number, tl.sum(second, axis=0))


@triton.jit
def divergence_gradient(
    logits, teacher, stride, teacher_stride, rows, teacher_rows, log_z, teacher_log_z, of_student, d_found, d_logits, real, temperature,
    KIND: tl.constexpr, BETA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`vocabulary.divergence_gradient`."""
    number = tl.program_id(0)
    start = tl.load(rows + number) * stride
    other = teacher + tl.load(teacher_rows + number) * teacher_stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = scaled(logits + start, at, real, temperature) - tl.load(log_z + number)
    q = scaled(other, at, real, temperature) - tl.load(teacher_log_z + number)
    if KIND == "forward":
        slope = tl.exp(s) - tl.exp(q)
    elif KIND == "reverse":
        slope = weighed(s, s - q - tl.load(of_student + number))
    else:
        slope = (1.0 - BETA) * weighed(s, s - mixed(s, q, BETA) - tl.load(of_student + number))
    slope *= tl.load(d_found + number) / temperature
    tl.store(d_logits + start + at, slope.to(d_logits.dtype.element_ty), mask=at < real)
