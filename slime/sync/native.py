"""Calls the compiled loops of the weight channel (native.c) with numpy arrays.

The library is built when slime is installed and lies beside this file as `_native*.so`. It has no Python in it: any interpreter loads it
with ctypes, SGLang's too, and others run while a loop does. Arrays must be contiguous; where a loop reads live memory by address, the
caller answers for it.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from slime.layout import Block

VERSION = 6  # of native.c: what its functions take and mean
HEAD_BYTES = 26  # of an exponent-coded block
CLASSES = 16
WHY = {-1: "positions", -2: "values", -3: "a bit stream", -4: "room", -5: "arguments"}  # what a loop found wrong
ANSWERS = (  # with a count, or a number of WHY
    *(
        "diff",
        "spans_count",
        "spans_list",
        "steps_encode",
        "steps_decode",
        "exponent_encode",
        "exponent_decode",
        "over_runs",
    ),
    *("move", "project", "runs"),
)
# Words of live memory in a row: size is the bytes of a word (1 or 2), start the index of the first word in its tensor.
RUN = np.dtype([("address", "<u8"), ("start", "<u8"), ("words", "<u8"), ("key", "<u8"), ("out", "<u4"), ("size", "<u4")])
# Entries [first, first + count) of the staged bits belong to the live memory at `address`: run = 0 at its elements index[at:at + count],
# run = 1 in a row.
SEGMENT = np.dtype([("address", "<u8"), ("first", "<u8"), ("count", "<u8"), ("at", "<u8"), ("width", "<u4"), ("run", "<u4")])

# A block in steps. Positions lie in [first, first + length), `changed` of them; `gaps` to `raw` are addresses of bytes, `low` is 0 where
# gaps have one byte; `gap_count` bytes of gaps and as many of low, `large_count` bytes of large, `raw_count` elements of raw.
STEPS_BLOCK = np.dtype(
    [
        *((name, "<i8") for name in ("first", "length")),
        *((name, "<u8") for name in ("changed", "gaps", "low", "signs", "flags", "large", "raw", "gap_count", "large_count", "raw_count")),
    ]
)

# Elements of two live memories that are compared: `first` is the position of the first in its block, `at` where its first entry goes.
SPAN = np.dtype([("old", "<u8"), ("live", "<u8"), ("first", "<u8"), ("count", "<u8"), ("at", "<u8")])

# As in C: bytes that nobody else has seen yet may be written.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(("PyBytes_FromStringAndSize", ctypes.pythonapi))
_address_of_bytes = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class NativeError(ValueError):
    """A loop refused its input: encoded bytes that say something impossible, or arrays that do not fit one another."""


@cache
def library() -> ctypes.CDLL:
    """The library. Raises ImportError when it was not built or is another version's."""
    folder = Path(__file__).parent
    mend = "run `pip install --no-deps --no-build-isolation --editable .` in slime's repository (it needs a C compiler)"
    paths = sorted(folder.glob("_native*.so"))
    if not paths:
        raise ImportError(f"{folder} has no _native*.so, slime's compiled code: {mend}")
    for path in paths:
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:  # built for another machine
            refused = error
            continue
        if loaded.slime_version() != VERSION:
            raise ImportError(f"{path} is older or newer than native.py: {mend}")
        loaded.slime_fingerprint.restype = ctypes.c_uint64
        for name in ANSWERS:
            getattr(loaded, f"slime_{name}").restype = ctypes.c_int64
        return loaded
    raise ImportError(f"{paths[0]} cannot be loaded ({refused}): {mend}")


def at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


def check(answer: int) -> None:
    if answer < 0:
        raise NativeError(f"{WHY.get(answer, answer)} out of bounds")


def diff(old: np.ndarray, new: np.ndarray, base: int = 0, level: int = 0) -> np.ndarray:
    """Positions (int64, ascending, `base` added) at which two 1-D arrays of one dtype differ in their bits. `level` 1 leaves out AVX-512, 2
    AVX2 too."""
    assert old.ndim == new.ndim == 1 and old.dtype == new.dtype and len(old) == len(new)
    chunk = 1 << 18
    found, scratch, width = [], np.empty(min(chunk, len(old)), np.int64), old.itemsize
    for start in range(0, len(old), chunk):
        a, b = old[start : start + chunk], new[start : start + chunk]
        count = library().slime_diff(at(a), at(b), u64(len(a)), width, ctypes.c_int64(base + start), at(scratch), level)
        check(count)
        found.append(scratch[:count].copy())
    return np.concatenate(found) if found else np.empty(0, np.int64)


def spans_count(spans: np.ndarray, width: int) -> np.ndarray:
    """int64 [spans]: how many elements of each SPAN differ. The addresses must be readable."""
    counts, spans = np.empty(len(spans), np.int64), records(spans, SPAN)
    check(library().slime_spans_count(at(spans), u64(len(spans)), width, at(counts)))
    return counts


def spans_list(spans: np.ndarray, everything: bool, positions: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """Fill positions (int32), old and new [n] with what differs in each SPAN, or with all of it, from its `at` on. Raises NativeError where
    there is no room."""
    assert positions.dtype == np.int32 and old.dtype == new.dtype and len(positions) == len(old) == len(new)
    out, spans = (at(positions), at(old), at(new), u64(len(positions))), records(spans, SPAN)
    check(library().slime_spans_list(at(spans), u64(len(spans)), old.itemsize, int(everything), *out))


def collect(addresses: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> None:
    """Fill out (uint8 [sum of sizes]) with stretches of memory, one after the other. addresses and sizes are uint64 [n]; all of it must be
    readable."""
    assert addresses.dtype == sizes.dtype == np.uint64 and len(addresses) == len(sizes) and int(sizes.sum()) == len(out) == out.nbytes
    library().slime_collect(at(addresses), at(sizes), u64(len(sizes)), at(out))


def joined(addresses: np.ndarray, sizes: np.ndarray) -> bytes:
    """What `collect` fills, in new memory that is written once, by a loop that other threads need not wait for."""
    assert addresses.dtype == sizes.dtype == np.uint64 and len(addresses) == len(sizes)
    whole = _new_bytes(None, int(sizes.sum()))
    library().slime_collect(at(addresses), at(sizes), u64(len(sizes)), ctypes.c_void_p(_address_of_bytes(whole)))
    return whole


def steps_encode(
    is_float: bool, gap_width: int, positions: np.ndarray, old: np.ndarray, new: np.ndarray, first: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Streams (gaps, low, signs, flags, large, raw) of a block's changes; see native.c. Raises NativeError for positions that are not
    ascending in [first, first + length) and where old and new are equal."""
    n, width = len(positions), old.itemsize
    assert positions.dtype == np.int64 and old.dtype == new.dtype and len(old) == len(new) == n
    gaps, low = np.empty((2, n + length // 255 + 1), np.uint8)
    signs, flags = np.empty((2, (n + 7) // 8), np.uint8)
    large, raw, sizes = np.empty(n, np.uint8), np.empty(n, new.dtype), np.zeros(3, np.uint64)
    streams = (at(gaps), at(low), at(signs), at(flags), at(large), at(raw), at(sizes))
    edges = (u64(n), ctypes.c_int64(first), ctypes.c_int64(length))
    check(library().slime_steps_encode(width, int(is_float), gap_width, at(positions), at(old), at(new), *edges, *streams))
    count, larges, raws = sizes.tolist()
    return gaps[:count], low[: count if gap_width == 2 else 0], signs, flags, large[:larges], raw[:raws]


class StepsError(NativeError):
    """Streams that say something impossible. `number`: of the block."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


def steps_decode(
    is_float: bool, blocks: np.ndarray, bits: np.ndarray, start: int, positions: np.ndarray, old: np.ndarray, new: np.ndarray
) -> None:
    """Fill positions, old and new [n] with the changes of every STEPS_BLOCK in turn, by the old bits of their tensor from position `start`
    on. Their addresses must be readable. Raises StepsError where streams do not say exactly as many changes of their block."""
    n, width, end = len(positions), bits.itemsize, start + len(bits)
    assert positions.dtype == np.int64 and old.dtype == new.dtype == bits.dtype and len(old) == len(new) == n
    assert int(blocks["changed"].sum()) == n and (blocks["first"] >= start).all() and (blocks["first"] + blocks["length"] <= end).all()
    rows, failed = records(blocks, STEPS_BLOCK), np.zeros(1, np.uint64)
    out = (at(positions), at(old), at(new), at(failed))
    try:
        check(library().slime_steps_decode(width, int(is_float), at(bits), ctypes.c_int64(start), at(rows), u64(len(rows)), *out))
    except NativeError as error:
        raise StepsError(int(failed[0]), str(error)) from None


def ones(addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [n]: bits that are set in each stretch of bytes (uint64 [n] both). All of it must be readable."""
    return _tally(addresses, sizes, 0)


def full_bytes(addresses: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The same of bytes that are 255."""
    return _tally(addresses, sizes, 1)


def _tally(addresses: np.ndarray, sizes: np.ndarray, what: int) -> np.ndarray:
    assert addresses.dtype == sizes.dtype == np.uint64 and len(addresses) == len(sizes)
    counts = np.empty(len(sizes), np.int64)
    library().slime_tally(at(addresses), at(sizes), u64(len(sizes)), what, at(counts))
    return counts


def exponent_encode(
    exponent: tuple[int, int], block: np.ndarray, positions: np.ndarray, new: np.ndarray, first: int, level: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Streams (head and gaps, values) of a block's changes, by the exponents of all its old bits; see native.c. Raises NativeError."""
    n, width = len(positions), block.itemsize
    assert positions.dtype == np.int64 and new.dtype == block.dtype and len(new) == n
    gaps = np.empty(HEAD_BYTES + 4 * (n + CLASSES) + 64, np.uint8)
    values = np.empty((5 + width) * n + 64, np.uint8)
    queue, sizes = np.empty(n + CLASSES, np.uint32), np.zeros(2, np.uint64)
    rooms = (at(gaps), at(gaps[HEAD_BYTES:]), u64(len(gaps) - HEAD_BYTES), at(values), u64(len(values)), at(sizes))
    edges = (at(positions), at(new), u64(n), ctypes.c_int64(first))
    check(library().slime_exponent_encode(width, at(block), u64(len(block)), *exponent, *edges, at(queue), *rooms, level))
    return gaps[: HEAD_BYTES + int(sizes[0])], values[: int(sizes[1])]


def exponent_decode(
    exponent: tuple[int, int],
    streams: tuple[np.ndarray, np.ndarray],
    block: np.ndarray,
    first: int,
    positions: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    level: int = 0,
) -> None:
    """Fill positions, old and new [n] from streams (uint8) and the old bits of the block. Raises NativeError as `steps_decode`."""
    gaps, values = streams
    assert positions.dtype == np.int64 and old.dtype == new.dtype == block.dtype and len(old) == len(new) == len(positions)
    if len(gaps) < HEAD_BYTES:
        raise NativeError("a head out of bounds")
    codes = gaps[HEAD_BYTES:]
    coded = (at(gaps), at(codes), u64(len(codes)), at(values), u64(len(values)), u64(len(positions)), ctypes.c_int64(first))
    out = (at(positions), at(old), at(new))
    check(library().slime_exponent_decode(block.itemsize, at(block), u64(len(block)), *exponent, *coded, *out, level))


def split(bits: np.ndarray) -> np.ndarray:
    """Byte planes (uint8 [width * n]) of bits [n]: all lowest bytes, then all second ones, and so on."""
    planes = np.empty(bits.nbytes, np.uint8)
    library().slime_split(bits.itemsize, at(bits), u64(len(bits)), at(planes))
    return planes


def merge(planes: np.ndarray, bits: np.ndarray) -> None:
    """The inverse of `split`, into bits [n]."""
    assert planes.dtype == np.uint8 and len(planes) == bits.nbytes
    library().slime_merge(bits.itemsize, at(planes), u64(len(bits)), at(bits))


def table(key: int) -> np.ndarray:
    """uint64 [1024]: the factors of words in a row; see fingerprint.py."""
    factors = np.empty(1024, np.uint64)
    library().slime_table(u64(key), at(factors))
    return factors


def fingerprint(words: np.ndarray, start: int, size: int, key: int, factors: np.ndarray, level: int = 0) -> int:
    """Of the bytes of an array, `size` (1 or 2) bytes a word, the first being word `start` of its tensor. `level` as in `diff`."""
    assert size in (1, 2) and words.nbytes % size == 0 and factors.dtype == np.uint64 and len(factors) == 1024
    return library().slime_fingerprint(at(words), u64(start), u64(words.nbytes // size), size, u64(key), at(factors), level)


def fingerprint_at(positions: np.ndarray, bits: np.ndarray, key: int, factors: np.ndarray, level: int = 0) -> int:
    """Of elements at positions (int64, in any order) of a tensor. `level` as in `diff`."""
    assert positions.dtype == np.int64 and len(positions) == len(bits) and factors.dtype == np.uint64 and len(factors) == 1024
    out = np.zeros(1, np.uint64)
    library().slime_fingerprint_at(bits.itemsize, at(positions), at(bits), u64(len(bits)), u64(key), at(factors), at(out), level)
    return int(out[0])


def fingerprint_moved(positions: np.ndarray, old: np.ndarray, new: np.ndarray, key: int, factors: np.ndarray, level: int = 0) -> int:
    """By how much `fingerprint_at` of the new bits is more than of the old ones, modulo 2^64."""
    assert positions.dtype == np.int64 and old.dtype == new.dtype and len(positions) == len(old) == len(new)
    assert factors.dtype == np.uint64 and len(factors) == 1024
    out, both = np.zeros(1, np.uint64), (at(positions), at(old), at(new))
    library().slime_fingerprint_moved(old.itemsize, *both, u64(len(new)), u64(key), at(factors), at(out), level)
    return int(out[0])


def project(
    positions: np.ndarray, old: np.ndarray, new: np.ndarray, source: Block, target: Block
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of changes (int64 [n], ascending; bits [n], bits [n]) those that lie in `source`: their positions in `target` (int64 [m], ascending),
    their old and new bits [m]."""
    n, dims, width = len(positions), len(source.shape), old.itemsize
    assert positions.dtype == np.int64 and old.dtype == new.dtype and len(old) == len(new) == n and len(target.shape) == dims
    move = np.array([source.offset, target.offset, *source.shape, *source.strides, *target.strides], np.int64)
    room = min(n, source.size)
    there, before, after = np.empty(room, np.int64), np.empty(room, old.dtype), np.empty(room, old.dtype)
    out = (at(there), at(before), at(after), u64(room))
    found = library().slime_project(width, at(positions), at(old), at(new), u64(n), at(move), dims, *out)
    check(found)
    for array in (there, before, after):
        array.resize(found, refcheck=False)  # gives back the rest in place: callers keep these, and of few changes most are elsewhere
    return there, before, after


def runs(positions: np.ndarray, least: int) -> np.ndarray:
    """int64 [k, 2]: first entry, and the one after the last, of every stretch of `least` (2 or more) or more consecutive ones among
    positions (int64 [n], ascending)."""
    assert positions.dtype == np.int64
    out = np.empty((len(positions) // least, 2), np.int64)
    found = library().slime_runs(at(positions), u64(len(positions)), u64(least), at(out), u64(len(out)))
    check(found)
    return out[:found]


def over_runs(runs: np.ndarray, factors: np.ndarray, outs: int) -> np.ndarray:
    """uint64 [outs]: sums of the fingerprints of RUNs in this process's memory, by their `out`. Raises NativeError for an `out` or word
    size that there is not."""
    sums, runs = np.zeros(outs, np.uint64), records(runs, RUN)
    check(library().slime_over_runs(at(runs), u64(len(runs)), at(factors), at(sums), u64(outs)))
    return sums


def scatter(segments: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
    """Write bits [entries] to the live memory of SEGMENTs of this width. index: 4-byte integers, read as unsigned. Raises NativeError, and
    writes nothing, for entries of bits or index that there are not; addresses and what index says of them are the caller's."""
    move(segments, index, bits, True)


def gather(segments: np.ndarray, index: np.ndarray, bits: np.ndarray) -> None:
    """Read the live memory of SEGMENTs into bits [entries]. Raises NativeError as `scatter`."""
    assert bits.flags.writeable
    move(segments, index, bits, False)


def move(segments: np.ndarray, index: np.ndarray, bits: np.ndarray, write: bool) -> None:
    assert index.itemsize == 4 and bits.ndim == 1
    segments = records(segments, SEGMENT)
    sizes = (at(index), u64(len(index)), at(bits), u64(len(bits)), bits.itemsize, int(write))
    check(library().slime_move(at(segments), u64(len(segments)), *sizes))


def records(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rows with these fields, in this order."""
    if rows.dtype == dtype:
        return np.ascontiguousarray(rows)
    own = np.empty(len(rows), dtype)
    for name in dtype.names or ():
        own[name] = rows[name]
    return own
