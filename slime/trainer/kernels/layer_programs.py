"""The programs of `layer` in Triton. Imported only where they run: on CUDA, or on the CPU under TRITON_INTERPRET=1.

All compute in fp32 and round once, when they store.
"""

import triton
import triton.language as tl


@triton.jit
def norm(x, low, weight, out, scales, width, eps, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """`layer.rms_norm` of a row, with LOW of x + low; keeps 1 / rms."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if LOW:
        value += tl.load(low + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (value * scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradient(d_out, x, weight, scales, d_x, d_weights, rows, width, BLOCK: tl.constexpr):
    """A program takes every n-th row, and adds up what the weight gets from them: fp32 [programs, width]."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        scale = tl.load(scales + row)
        normed = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * scale
        slope = tl.load(d_out + row * width + at, mask=inside, other=0.0).to(tl.float32)
        d_weight += slope * normed
        slope *= w
        shared = tl.sum(slope * normed, axis=0) / width
        tl.store(d_x + row * width + at, ((slope - normed * shared) * scale).to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weights + tl.program_id(0) * width + at, d_weight, mask=inside)


@triton.jit
def add(x, residual, low, out, out_low, count, LOW: tl.constexpr, BLOCK: tl.constexpr):
    """`layer.added` of a block: x + residual (+ low with LOW), rounded, and what rounding took."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if LOW:
        total += tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=inside)
    tl.store(out_low + at, (total - rounded.to(tl.float32)).to(out_low.dtype.element_ty), mask=inside)


@triton.jit
def gated(pair, width, row, at):
    """(gate, up) of a row, fp32."""
    gate = pair + row * 2 * width + at
    inside = at < width
    return tl.load(gate, mask=inside, other=0.0).to(tl.float32), tl.load(gate + width, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def swiglu(pair, out, width, BLOCK: tl.constexpr):
    """`layer.swiglu` of a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = gated(pair, width, row, at)
    tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def swiglu_gradient(d_out, pair, d_pair, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = gated(pair, width, row, at)
    slope = tl.load(d_out + row * width + at, mask=inside, other=0.0).to(tl.float32)
    open_by = tl.sigmoid(gate)
    kept = gate * open_by
    d_gate = slope * up * (open_by + kept * (1.0 - open_by))
    to = d_pair + row * 2 * width + at
    tl.store(to, d_gate.to(d_pair.dtype.element_ty), mask=inside)
    tl.store(to + width, (slope * kept).to(d_pair.dtype.element_ty), mask=inside)


# Heads of one token: a tile [HEADS, SIZE / 2] of first and one of second channels, which rotate together. Channels from TURNED on do not.


@triton.jit
def channels(SIZE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(first, second) channel of each pair, int32 [SIZE / 2]."""
    pair = tl.arange(0, SIZE // 2)
    still = TURNED + pair - TURNED // 2
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + TURNED // 2
    turns = pair < TURNED // 2
    return tl.where(turns, first, still), tl.where(turns, second, still + (SIZE - TURNED) // 2)


@triton.jit
def turn(angles, position, mscale, SIZE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(cos, sin) of a position, fp32 [SIZE / 2]; `angles` fp32 [positions, TURNED], each twice."""
    pair = tl.arange(0, SIZE // 2)
    turns = pair < TURNED // 2
    if INTERLEAVED:
        pair *= 2
    angle = tl.load(angles + position * TURNED + pair, mask=turns, other=0.0)
    return tl.where(turns, tl.cos(angle) * mscale, 1.0), tl.sin(angle) * mscale


@triton.jit
def heads(
    mixed, out, weight, angles, positions, heads_of_row, eps, mscale,
    SIZE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    COUNT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of one token's `heads_of_row` heads those COUNT that are wanted, normed and turned. They lie SHARED together from the FIRST on, in
    every GROUP."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    inside = (head < COUNT)[:, None]
    first, second = channels(SIZE, TURNED, INTERLEAVED)
    row = mixed + (token * heads_of_row + head // SHARED * GROUP + head % SHARED + FIRST)[:, None] * SIZE
    a = tl.load(row + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / SIZE + eps)[:, None]
        a *= scale * tl.load(weight + first).to(tl.float32)[None, :]
        b *= scale * tl.load(weight + second).to(tl.float32)[None, :]
    cos, sin = turn(angles, tl.load(positions + token), mscale, SIZE, TURNED, INTERLEAVED)
    to = out + (token * COUNT + head)[:, None] * SIZE
    tl.store(to + first[None, :], (a * cos[None, :] - b * sin[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(to + second[None, :], (b * cos[None, :] + a * sin[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def heads_gradient(
    d_out, mixed, weight, angles, positions, d_mixed, d_weights, tokens, heads_of_row, eps, mscale,
    SIZE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
    COUNT: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th token, and adds up what the norm's weight gets from them: d_weights fp32 [programs, SIZE]."""
    head = tl.arange(0, HEADS)
    inside = (head < COUNT)[:, None]
    first, second = channels(SIZE, TURNED, INTERLEAVED)
    slots = head // SHARED * GROUP + head % SHARED + FIRST
    if NORMED:
        weight_a = tl.load(weight + first).to(tl.float32)[None, :]
        weight_b = tl.load(weight + second).to(tl.float32)[None, :]
        to_a = tl.zeros([SIZE // 2], tl.float32)
        to_b = tl.zeros([SIZE // 2], tl.float32)
    for number in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        of = d_out + (token * COUNT + head)[:, None] * SIZE
        a = tl.load(of + first[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(of + second[None, :], mask=inside, other=0.0).to(tl.float32)
        cos, sin = turn(angles, tl.load(positions + token), mscale, SIZE, TURNED, INTERLEAVED)
        a, b = a * cos[None, :] + b * sin[None, :], b * cos[None, :] - a * sin[None, :]
        row = (token * heads_of_row + slots)[:, None] * SIZE
        if NORMED:
            x_a = tl.load(mixed + row + first[None, :], mask=inside, other=0.0).to(tl.float32)
            x_b = tl.load(mixed + row + second[None, :], mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt((tl.sum(x_a * x_a, axis=1) + tl.sum(x_b * x_b, axis=1)) / SIZE + eps)[:, None]
            x_a *= scale
            x_b *= scale
            to_a += tl.sum(a * x_a, axis=0)
            to_b += tl.sum(b * x_b, axis=0)
            a *= weight_a
            b *= weight_b
            shared = ((tl.sum(a * x_a, axis=1) + tl.sum(b * x_b, axis=1)) / SIZE)[:, None]
            a = (a - x_a * shared) * scale
            b = (b - x_b * shared) * scale
        tl.store(d_mixed + row + first[None, :], a.to(d_mixed.dtype.element_ty), mask=inside)
        tl.store(d_mixed + row + second[None, :], b.to(d_mixed.dtype.element_ty), mask=inside)
    if NORMED:
        to = d_weights + tl.program_id(0) * SIZE
        tl.store(to + first, to_a)
        tl.store(to + second, to_b)
