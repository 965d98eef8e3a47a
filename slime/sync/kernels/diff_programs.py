"""The kernels of a publication in Triton: what differs between two memories, and its coding as steps. Imported only where they run.

`count_changes` takes a span a program and reads it in steps of STEP elements, 16 bytes a thread at once where WIDE says that both memories
allow it. It leaves a bit an element for `list_changes`, which then reads what differs and nothing else: one element in eighty. Both are
needed, since counts must be known before there is room for the entries.

`measure` and `write` take a tile of the entries that `list_changes` has made, of one block, and are small beside those two: an entry is
one in eighty elements. Bits are computed with as 64-bit numbers, whatever their width. Of a gap only the last byte is written: those before
it are 255, which is what `write` finds everywhere.
"""

import triton
import triton.language as tl

from slime.sync.kernels.programs import mix

TYPES = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # of bits, by width: what torch calls them
UNSIGNED = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


@triton.jit
def two_memories(span, first, count, STEP: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Elements [first, first + STEP) of a span: which there are, old bits, new bits."""
    old = tl.load(span).to(tl.pointer_type(TYPE))
    live = tl.load(span + 1).to(tl.pointer_type(TYPE))
    if WIDE:
        old = tl.multiple_of(old, 16)
        live = tl.multiple_of(live, 16)
        count = tl.multiple_of(count, 16)
    at = first + tl.arange(0, STEP)
    inside = at < count
    before = tl.load(old + at, mask=inside, other=0)
    after = tl.load(live + at, mask=inside, other=0)
    return inside, before, after


@triton.jit
def count_changes(spans, order, masks, counts, FIELDS: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """counts[span], int32: how many elements differ, and which, as bits of int32 masks from the span's `at` on. `spans` int64 [n, FIELDS]:
    native.SPAN; `order` int32 [programs]: their spans."""
    number = tl.load(order + tl.program_id(0))
    span = spans + number.to(tl.int64) * FIELDS
    elements = tl.load(span + 3).to(tl.int32)
    masks += tl.load(span + 4)
    word, lane = tl.arange(0, STEP // 32), tl.arange(0, 32)
    found = tl.zeros([STEP // 32], tl.int32)
    for first in range(0, elements, STEP):
        inside, before, after = two_memories(span, first, elements, STEP, TYPE, WIDE)
        differs = tl.reshape((inside & (before != after)).to(tl.int32), [STEP // 32, 32])
        bits = tl.sum(differs << lane[None, :], axis=1)
        tl.store(masks + first // 32 + word, bits, mask=first + word * 32 < elements)
        found += ones(bits.to(tl.uint32, bitcast=True)).to(tl.int32)
    tl.store(counts + number, tl.sum(found, axis=0))


@triton.jit
def ones(bits):
    """How many bits of a uint32 are set."""
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def list_changes(
    spans,
    order,
    begins,
    everything,
    masks,
    positions,
    olds,
    news,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """What differs in a span, or all of it where `everything` is not 0, from entry begins[program] on: what `masks` says, a word of it a
    lane, a bit of every word at a time. A span has at most WORDS of them."""
    number = tl.load(order + tl.program_id(0))
    span = spans + number.to(tl.int64) * FIELDS
    old = tl.load(span).to(tl.pointer_type(TYPE))
    live = tl.load(span + 1).to(tl.pointer_type(TYPE))
    block_first = tl.load(span + 2).to(tl.int32)
    elements = tl.load(span + 3).to(tl.int32)
    element = tl.arange(0, WORDS) * 32
    inside = element < elements
    bits = tl.load(masks + tl.load(span + 4) + tl.arange(0, WORDS), mask=inside, other=0).to(tl.uint32, bitcast=True)
    if everything != 0:
        some = tl.where(elements - element < 32, elements - element, 32)
        bits = tl.where(inside, (tl.full([WORDS], 1, tl.uint64) << some.to(tl.uint64)) - 1, 0).to(tl.uint32)
    number_of = ones(bits).to(tl.int32)
    there = tl.load(begins + tl.program_id(0)) + tl.cumsum(number_of, axis=0) - number_of
    while tl.max(number_of, axis=0) > 0:
        listed = number_of > 0
        at = element + ones((bits & (0 - bits)) - 1).to(tl.int32)  # of the lowest bit
        tl.store(positions + there, block_first + at, mask=listed)
        tl.store(olds + there, tl.load(old + at, mask=listed, other=0), mask=listed)
        tl.store(news + there, tl.load(live + at, mask=listed, other=0), mask=listed)
        bits, there, number_of = bits & (bits - 1), there + 1, number_of - 1


@triton.jit
def unsigned(bits, TYPE: tl.constexpr):
    return bits.to(TYPE, bitcast=True).to(tl.uint64)


@triton.jit
def key_of(bits, WIDTH: tl.constexpr, FLOAT: tl.constexpr):
    """A float's bits as a number of the same order, see native.c."""
    if FLOAT:
        low: tl.constexpr = (1 << (8 * WIDTH - 1)) - 1
        negative = (bits >> (8 * WIDTH - 1)) != 0
        return tl.where(negative, low - (bits & low), bits + (low + 1))
    return bits


@triton.jit
def step(old, new, WIDTH: tl.constexpr, FLOAT: tl.constexpr):
    """From old to new in units in the last place: whether down, and how far."""
    distance = key_of(new, WIDTH, FLOAT) - key_of(old, WIDTH, FLOAT)
    if WIDTH < 8:
        distance = distance & ((1 << (8 * WIDTH)) - 1)
    down = (distance >> (8 * WIDTH - 1)) != 0
    back = key_of(old, WIDTH, FLOAT) - key_of(new, WIDTH, FLOAT)
    if WIDTH < 8:
        back = back & ((1 << (8 * WIDTH)) - 1)
    return down, tl.where(down, back, distance)


@triton.jit
def gaps_of(tile, positions, entry, inside):
    """Of a tile's entries: unchanged elements before each, how many escapes that takes, what is left."""
    begin = tl.load(tile)
    limit = tl.load(tile + 3).to(tl.int32)
    here = tl.load(positions + (begin + entry), mask=inside, other=0)
    has_one_before = inside & (entry + tl.load(tile + 2) > 0)
    before = tl.load(positions + (begin + entry - 1), mask=has_one_before, other=-1)
    gap = tl.where(inside, here - before - 1, 0)
    escapes = gap // limit
    return here, escapes, gap - escapes * limit


@triton.jit
def words_times_factors(position, old, new, key, start, table, inside, WIDTH: tl.constexpr):
    """By how much an entry changes the fingerprint of its tensor, see fingerprint.py."""
    size: tl.constexpr = 8 if WIDTH == 1 else 16  # bits of a word
    words: tl.constexpr = 1 if WIDTH == 1 else WIDTH // 2
    mask: tl.constexpr = (1 << size) - 1
    total = tl.zeros_like(old)
    for nth in tl.static_range(words):
        word = (start + position.to(tl.uint64)) * words + nth
        factor = tl.load(table + (word & 1023).to(tl.int32), mask=inside, other=0)
        row = mix(key + ((word >> 10) + 1) * 0x9E3779B97F4A7C15) | 1
        total += (((new >> (size * nth)) & mask) - ((old >> (size * nth)) & mask)) * factor * row
    return tl.where(inside, total, 0)


@triton.jit
def measure(
    tiles,
    positions,
    olds,
    news,
    table,
    sizes,
    sums,
    FIELDS: tl.constexpr,
    ENTRIES: tl.constexpr,
    TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """Of a tile (steps.TILE): sizes int32 [tiles, 3], elements of its gaps, large and raw; and its share of sums int64 [blocks], what
    the block adds to the fingerprint of its tensor."""
    number = tl.program_id(0)
    tile = tiles + number.to(tl.int64) * FIELDS
    begin = tl.load(tile)
    entry = tl.arange(0, ENTRIES)
    inside = entry < tl.load(tile + 1)
    here, escapes, _ = gaps_of(tile, positions, entry, inside)
    old = unsigned(tl.load(olds + (begin + entry), mask=inside, other=0), TYPE)
    new = unsigned(tl.load(news + (begin + entry), mask=inside, other=0), TYPE)
    _, far = step(old, new, WIDTH, FLOAT)
    tl.store(sizes + number * 3, tl.sum(tl.where(inside, escapes + 1, 0), axis=0))
    tl.store(sizes + number * 3 + 1, tl.sum((inside & (far > 1)).to(tl.int32), axis=0))
    tl.store(sizes + number * 3 + 2, tl.sum((inside & (far > 256)).to(tl.int32), axis=0))
    key = tl.load(tile + 4).to(tl.uint64, bitcast=True)
    start = tl.load(tile + 5).to(tl.uint64, bitcast=True)
    share = words_times_factors(here, old, new, key, start, table, inside, WIDTH)
    tl.atomic_add(sums + tl.load(tile + 6), tl.sum(share, axis=0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def store_bits(out, bits, ENTRIES: tl.constexpr, count):
    """A bit for each entry, 8 a byte."""
    lane = tl.arange(0, 8)
    packed = tl.sum(tl.reshape(bits.to(tl.int32), [ENTRIES // 8, 8]) << lane[None, :], axis=1)
    byte = tl.arange(0, ENTRIES // 8)
    tl.store(out + byte, packed.to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def write(
    tiles,
    places,
    positions,
    olds,
    news,
    out,
    FIELDS: tl.constexpr,
    STREAMS: tl.constexpr,
    ENTRIES: tl.constexpr,
    TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """A tile's part of the streams of its block, at bytes places[tile] of out: int64 [tiles, STREAMS], the order of codec.py. `out`, uint8,
    is 255 everywhere."""
    number = tl.program_id(0).to(tl.int64)
    tile, place = tiles + number * FIELDS, places + number * STREAMS
    begin, count = tl.load(tile), tl.load(tile + 1)
    entry = tl.arange(0, ENTRIES)
    inside = entry < count
    _, escapes, rest = gaps_of(tile, positions, entry, inside)
    there = tl.cumsum(tl.where(inside, escapes + 1, 0), axis=0) - 1
    two_bytes = tl.load(tile + 3) > 255
    high = tl.where(two_bytes, rest >> 8, rest)
    tl.store(out + tl.load(place) + there, high.to(tl.uint8), mask=inside)
    tl.store(out + tl.load(place + 1) + there, (rest & 255).to(tl.uint8), mask=inside & two_bytes)
    old = unsigned(tl.load(olds + (begin + entry), mask=inside, other=0), TYPE)
    new = unsigned(tl.load(news + (begin + entry), mask=inside, other=0), TYPE)
    down, far = step(old, new, WIDTH, FLOAT)
    flagged = inside & (far > 1)
    store_bits(out + tl.load(place + 2), inside & down, ENTRIES, count)
    store_bits(out + tl.load(place + 3), flagged, ENTRIES, count)
    nth = tl.cumsum(flagged.to(tl.int32), axis=0) - 1
    tl.store(out + tl.load(place + 4) + nth, tl.where(far > 256, 255, far - 2).to(tl.uint8), mask=flagged)
    raw = inside & (far > 256)
    nth = tl.cumsum(raw.to(tl.int32), axis=0) - 1
    for byte in tl.static_range(WIDTH):
        tl.store(out + tl.load(place + 5) + nth * WIDTH + byte, ((new >> (8 * byte)) & 255).to(tl.uint8), mask=raw)
