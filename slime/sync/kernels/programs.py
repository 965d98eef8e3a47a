"""The kernels in Triton. Imported only where they run: on CUDA, or on the CPU under TRITON_INTERPRET=1.

`fingerprint` reads words in rows of 1024, as the definition multiplies them: F = sum over rows h of U(h) * (sum over j of V[j] word[h, j]).
A program takes some rows of one run and holds V in registers, 1024 factors over its threads, so that a row costs little but its words. The
product of a 16-bit word with a 64-bit V is two multiply-adds: with the low half of V into 64 bits, with the high half into 32 that wrap.
U is the same for all threads of a program, and the compiler computes it on the scalar units beside them. A run may begin and end inside a
row; what lies outside is masked in whole vectors, which keeps loads 16 bytes wide.

`scatter` and `gather` move entries of one width between staged arrays and addresses. Their pointers are not specialised on alignment:
slices of a staged file begin anywhere, and a kernel must not be compiled anew while engines are paused.
"""

import triton
import triton.language as tl

STEP = tl.constexpr(4)  # rows whose loads are under way together


@triton.jit
def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def row_factor(key, number):
    """U of a row; `number` counts from 1."""
    return mix(key + number.to(tl.uint64) * 0x9E3779B97F4A7C15) | 1


@triton.jit
def load_row(words, spot, vector, first, end, row, vectors: tl.constexpr):
    """Words [vectors, VECTOR] of a tile's row; 0 outside of vectors [first, end) of the tile."""
    before = row * vectors
    inside = (vector >= first - before) & (vector < end - before)
    return tl.load(words + tl.cast(before, tl.int64) * spot.shape[1] + spot, mask=inside[:, None], other=0)


@triton.jit
def row_times_v(word, v_low, v_high):
    """uint64 [vectors]: sums of the words of a vector times V."""
    low = tl.sum(word.to(tl.uint64) * v_low.to(tl.uint64), axis=1)
    high = tl.sum(word.to(tl.uint32) * v_high, axis=1)
    return low + (high.to(tl.uint64) << 32)


@triton.jit
def fingerprint(tiles, table, outs, FIELDS: tl.constexpr, BYTES: tl.constexpr, VECTOR: tl.constexpr):
    """Adds the fingerprint of a tile to its out. `tiles` int64 [programs, FIELDS]: `audit.TILE`; `table` uint64 [1024]; `outs` int64.
    A word has BYTES, VECTOR of them are loaded at once."""
    tile = tiles + tl.program_id(0).to(tl.int64) * FIELDS
    address = tl.load(tile)
    row0 = tl.load(tile + 1)
    first = tl.load(tile + 2).to(tl.int32)
    end = tl.load(tile + 3).to(tl.int32)
    key = tl.load(tile + 4).to(tl.uint64, bitcast=True)
    out = tl.load(tile + 5)
    if BYTES == 2:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), VECTOR * BYTES)
    else:
        words = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), VECTOR * BYTES)
    vectors: tl.constexpr = 1024 // VECTOR  # in a row
    vector = tl.arange(0, vectors)
    lane = tl.arange(0, VECTOR)
    spot = vector[:, None] * VECTOR + lane[None, :]
    v = tl.load(table + spot)
    v_low = (v & 0xFFFFFFFF).to(tl.uint32)
    v_high = (v >> 32).to(tl.uint32)
    total = tl.zeros([vectors], tl.uint64)
    word0 = load_row(words, spot, vector, first, end, 0, vectors)
    word1 = load_row(words, spot, vector, first, end, 1, vectors)
    word2 = load_row(words, spot, vector, first, end, 2, vectors)
    word3 = load_row(words, spot, vector, first, end, 3, vectors)
    for row in range(0, tl.cdiv(end, vectors), STEP):  # loads are a step ahead of their use
        next0 = load_row(words, spot, vector, first, end, row + STEP, vectors)
        next1 = load_row(words, spot, vector, first, end, row + STEP + 1, vectors)
        next2 = load_row(words, spot, vector, first, end, row + STEP + 2, vectors)
        next3 = load_row(words, spot, vector, first, end, row + STEP + 3, vectors)
        at = row0 + row + 1
        total += row_times_v(word0, v_low, v_high) * row_factor(key, at)
        total += row_times_v(word1, v_low, v_high) * row_factor(key, at + 1)
        total += row_times_v(word2, v_low, v_high) * row_factor(key, at + 2)
        total += row_times_v(word3, v_low, v_high) * row_factor(key, at + 3)
        word0, word1, word2, word3 = next0, next1, next2, next3
    tl.atomic_add(outs + out, tl.sum(total, axis=0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def places(tile, index, entry, inside, TYPE: tl.constexpr):
    """Live pointers of a tile's entries: by the index, or one after another where the tile is a run."""
    address = tl.load(tile).to(tl.pointer_type(TYPE))
    run = tl.load(tile + 4) != 0
    listed = tl.load(index + (tl.load(tile + 2) + entry), mask=inside & (not run), other=0)
    return address + tl.where(run, entry.to(tl.int64), listed.to(tl.uint32, bitcast=True).to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=["index", "bits"])
def scatter(tiles, index, bits, FIELDS: tl.constexpr, ENTRIES: tl.constexpr):
    """bits -> live. `tiles` int64 [programs, FIELDS]: `scatter.TILE`."""
    tile = tiles + tl.program_id(0).to(tl.int64) * FIELDS
    entry = tl.arange(0, ENTRIES)
    inside = entry < tl.load(tile + 3)
    live = places(tile, index, entry, inside, bits.dtype.element_ty)
    tl.store(live, tl.load(bits + (tl.load(tile + 1) + entry), mask=inside), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["index", "bits"])
def gather(tiles, index, bits, FIELDS: tl.constexpr, ENTRIES: tl.constexpr):
    """live -> bits."""
    tile = tiles + tl.program_id(0).to(tl.int64) * FIELDS
    entry = tl.arange(0, ENTRIES)
    inside = entry < tl.load(tile + 3)
    live = places(tile, index, entry, inside, bits.dtype.element_ty)
    tl.store(bits + (tl.load(tile + 1) + entry), tl.load(live, mask=inside), mask=inside)
