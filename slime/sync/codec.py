"""How the changes of one block of a tensor become bytes.

Four methods; which one is smallest decides, block by block:

    steps     positions as gaps, values as steps in units in the last place, each stream through zstd. Almost all changes of an optimizer
              step are one unit up or down, so a change costs little more than the entropy of its position.
              Gaps are bytes (255 = 255 unchanged, go on), or 16 bits where less than one element in GAP16_BELOW changes. Bytes stay as
              they are where one element in GAPS_RAW changes: where such changes lie evenly, zstd saves a twelfth at most.
    exponent  the same facts in Rice codes by the class of the old value's exponent: whether bf16 sees an update depends on it. About 30 %
              smaller, slower, and both sides walk over all old bits. A block where steps are smaller keeps them.
    dense     byte planes of all new bits, through zstd. Only where all elements are listed; it alone needs no old bits.
    (nothing  a block without changes has no row.)

Streams, in the order of a row's sizes. A stream as long as its declared raw length is raw, a shorter one is a zstd frame without magic:

    steps8    gaps, -, signs, flags, large, raw        steps16   high bytes of gaps, low bytes, signs, flags, large, raw
    exponent  head and gap codes, value codes (never zstd)           dense     planes
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from slime.sync import native
from slime.sync.native import STEPS_BLOCK, NativeError, StepsError
from slime.sync.records import ElementType

CODECS = ("steps", "exponent", "dense")  # dense: whole weights that need no old ones
STEPS8, STEPS16, EXPONENT, DENSE = 1, 2, 3, 4
METHODS = {STEPS8: "steps8", STEPS16: "steps16", EXPONENT: "exponent", DENSE: "dense"}
STREAMS = 6  # most of any method
USED = {STEPS8: (0, 2, 3, 4, 5), STEPS16: (0, 1, 2, 3, 4, 5), EXPONENT: (0, 1), DENSE: (0,)}
GAP16_BELOW = 340  # elements for each changed one
GAPS_RAW = (64, 128)  # elements for each changed one, [least, most)
WORTH_BYTES = 24  # of a stream that zstd may make shorter
MOST_WINDOW = 1 << 27  # of a zstd frame; its content is checked first


class Packer:
    """zstd both ways. One of a thread."""

    def __init__(self) -> None:
        bare = zstandard.FORMAT_ZSTD1_MAGICLESS
        fast = zstandard.ZstdCompressionParameters.from_level(1, format=bare, write_content_size=1, write_checksum=0, write_dict_id=0)
        self._pack = zstandard.ZstdCompressor(compression_params=fast)
        self._unpack = zstandard.ZstdDecompressor(format=bare, max_window_size=MOST_WINDOW)

    def pack(self, raw: np.ndarray) -> bytes:
        """Bytes of a contiguous array, raw where zstd makes them no shorter."""
        if raw.nbytes < WORTH_BYTES:
            return raw.tobytes()
        packed = self._pack.compress(raw.data if raw.dtype == np.uint8 else raw.view(np.uint8).data)
        return packed if len(packed) < raw.nbytes else raw.tobytes()

    def pack_all(self, raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray, left: np.ndarray, threads: int) -> "Scattered":
        """`pack` of many streams at once, on so many threads: those at begins (int64 [n]) of raw (uint8), sizes (int64 [n]) bytes each.
        Those that are to be `left` (bool [n]) stay raw."""
        worth = np.flatnonzero((sizes >= WORTH_BYTES) & ~left)
        addresses, lengths = raw.ctypes.data + begins.astype(np.uint64), sizes.copy()
        if not len(worth):
            return Scattered(addresses, lengths, (raw,))
        segments = np.stack([begins[worth], sizes[worth]], axis=1).astype("<u8")
        packed: Any = self._pack.multi_compress_to_buffer(zstandard.BufferWithSegments(raw.data, segments.tobytes()), threads=threads)
        shorter = np.fromiter(map(len, packed), np.int64, len(packed))
        ends = np.append(0, np.cumsum(shorter))
        firsts = _firsts(packed, ends)
        bases = np.array([np.frombuffer(packed[i], np.uint8).ctypes.data for i in firsts], np.uint64)
        of = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(packed)]))
        there = bases[of] + (ends[:-1] - ends[firsts][of]).astype(np.uint64)
        gains = shorter < sizes[worth]
        addresses[worth] = np.where(gains, there, addresses[worth])
        lengths[worth] = np.where(gains, shorter, lengths[worth])
        return Scattered(addresses, lengths, (raw, packed))

    def unpack(self, packed: memoryview, size: int) -> np.ndarray:
        """The uint8 [size] that `pack` had. Raises NativeError when they are not in there; never allocates more than size."""
        if len(packed) == size:
            return np.frombuffer(packed, np.uint8) if size else np.empty(0, np.uint8)
        try:
            told = zstandard.get_frame_parameters(packed, format=zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
            if len(packed) > size or told != size:
                raise NativeError(f"a stream of {len(packed)} bytes for {size}")
            raw = self._unpack.decompress(packed, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise NativeError(f"a zstd stream: {error}") from error
        if len(raw) != size:
            raise NativeError(f"a stream that ends after {len(raw)} of {size} bytes")
        return np.frombuffer(raw, np.uint8)


def _firsts(packed: Any, ends: np.ndarray) -> list[int]:
    """Frames with which a memory begins. Those of one lie one after the other; asking each of them where it lies takes longer than zstd."""
    firsts = [0]

    def elsewhere(frame: int) -> bool:
        return packed[frame].offset != ends[frame] - ends[firsts[-1]]

    while (first := bisect_left(range(len(packed)), True, lo=firsts[-1], key=elsewhere)) < len(packed):
        firsts.append(first)
    return firsts


@dataclass(frozen=True, slots=True)
class Scattered:
    """Bytes in this process's memory, many pieces, which `memory` keeps alive."""

    addresses: np.ndarray  # uint64 [n]
    sizes: np.ndarray  # int64 [n]
    memory: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Coded:
    """A block as bytes. `changed`: entries that decoding yields; `gaps`: raw length of the gap stream, 0 for exponent and dense."""

    method: int
    changed: int
    gaps: int
    streams: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.streams))


@dataclass(frozen=True, slots=True)
class Entries:
    """Changes of one block, or room for them. Positions lie in [first, first + length)."""

    first: int
    length: int
    positions: np.ndarray  # int64 [n], ascending
    old: np.ndarray  # bits [n]
    new: np.ndarray  # bits [n]


def encode_block(kind: ElementType, entries: Entries, codec: str, block: np.ndarray | None, packer: Packer) -> Coded | None:
    """The smallest coding of a block; None where nothing changed. `block`: all its old bits, which codec "exponent" needs.
    Raises ValueError for entries that are not ascending in the block, and for codec "dense" when some are missing."""
    complete = len(entries.positions) == entries.length
    if codec == "dense":
        if not complete:
            raise ValueError(f"{len(entries.positions)} of {entries.length} elements are listed: dense weights need all")
        return _dense(entries, packer)
    listed, changed = entries, entries.old != entries.new
    if not changed.all():
        entries = Entries(entries.first, entries.length, *(x[changed] for x in (entries.positions, entries.old, entries.new)))
    if not len(entries.positions):
        return None
    found = [_steps(kind, entries, packer)]
    if codec == "exponent":
        assert block is not None and len(block) == entries.length
        if not np.array_equal(block[entries.positions - entries.first], entries.old):
            raise ValueError("the old bits of the changes are not those of the tensor")
        gaps, values = native.exponent_encode(kind.exponent or (0, 0), block, entries.positions, entries.new, entries.first)
        found.append(Coded(EXPONENT, len(entries.positions), 0, (gaps.tobytes(), values.tobytes())))
    if complete:
        found.append(_dense(listed, packer))
    return min(found, key=lambda coded: coded.nbytes)


def _steps(kind: ElementType, entries: Entries, packer: Packer) -> Coded:
    n = len(entries.positions)
    gap_width = 2 if n * GAP16_BELOW < entries.length else 1
    gaps, *rest = native.steps_encode(
        kind.exponent is not None, gap_width, entries.positions, entries.old, entries.new, entries.first, entries.length
    )
    packed = gaps.tobytes() if gaps_stay(n, entries.length) else packer.pack(gaps)
    return Coded(STEPS16 if gap_width == 2 else STEPS8, n, len(gaps), (packed, *(packer.pack(array) for array in rest)))


def gaps_stay(changed: int | np.ndarray, length: int | np.ndarray) -> bool | np.ndarray:
    """Whether the gaps of a block (int), or of each of some (int64 [n]), do not go through zstd."""
    least, most = GAPS_RAW
    return (changed * least <= length) & (length < changed * most)


def _dense(entries: Entries, packer: Packer) -> Coded:
    return Coded(DENSE, entries.length, 0, (packer.pack(native.split(entries.new)),))


def most_gaps(method: np.ndarray, changed: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64 [n]: the longest gap stream that so many changes of a block have."""
    return np.select([method == STEPS8, method == STEPS16], [changed + length // 255, changed + length // 65535], 0)


@dataclass(frozen=True, slots=True)
class PackedSteps:
    """Blocks in steps as they came. Their streams lie in `payload`, each through zstd or not."""

    payload: np.ndarray  # uint8
    begins: np.ndarray  # int64 [n, STREAMS], where in it a stream begins
    sizes: np.ndarray  # int64 [n, STREAMS], bytes that it has there
    two_bytes: np.ndarray  # bool [n], whether gaps have two
    changed: np.ndarray  # int64 [n], entries
    gaps: np.ndarray  # int64 [n], bytes of the gap stream
    width: np.ndarray  # int64 [n], bytes of an element
    first: np.ndarray  # int64 [n], position of the first element
    length: np.ndarray  # int64 [n], elements

    def unpack(self, packer: Packer) -> "RawSteps":
        """Out of zstd. Raises StepsError for streams of other lengths than they should have."""
        found, memory = np.zeros(len(self.changed), STEPS_BLOCK), [self.payload]

        def stream(number: int, size: np.ndarray) -> np.ndarray:
            """Addresses of the raw bytes of a stream of every block, which has `size` (int64 [n]) of them."""
            begins, sizes = self.begins[:, number], self.sizes[:, number]
            addresses = (self.payload.ctypes.data + begins).astype(np.uint64)
            for i in np.flatnonzero(sizes != size).tolist():
                try:
                    memory.append(packer.unpack(self.payload[begins[i] : begins[i] + sizes[i]].data, int(size[i])))
                except NativeError as error:
                    raise StepsError(i, str(error)) from error
                addresses[i] = memory[-1].ctypes.data
            return addresses

        one_each = (self.changed + 7) // 8
        found["first"], found["length"], found["changed"], found["gap_count"] = self.first, self.length, self.changed, self.gaps
        found["gaps"] = stream(0, self.gaps)
        found["low"] = np.where(self.two_bytes, stream(1, np.where(self.two_bytes, self.gaps, 0)), 0)
        found["signs"], found["flags"] = stream(2, one_each), stream(3, one_each)
        large = native.ones(found["flags"].copy(), one_each.astype(np.uint64))
        found["large"], found["large_count"] = stream(4, large), large
        raw = native.full_bytes(found["large"].copy(), large.astype(np.uint64))
        found["raw"], found["raw_count"] = stream(5, raw * self.width), raw
        return RawSteps(found, tuple(memory))


@dataclass(frozen=True, slots=True)
class RawSteps:
    """Blocks in steps, out of zstd."""

    blocks: np.ndarray  # STEPS_BLOCK [n]
    memory: tuple[np.ndarray, ...]  # where their streams lie


def decode_block(kind: ElementType, method: int, streams: Sequence[memoryview], block: np.ndarray, out: Entries, packer: Packer) -> None:
    """Fill `out`, whose n is the declared number of changes, from STREAMS streams of method EXPONENT or DENSE and the block's old bits.
    Raises NativeError for streams that say something else or nothing."""
    if method == EXPONENT:
        codes, values = (packer.unpack(stream, len(stream)) for stream in streams[:2])
        native.exponent_decode(kind.exponent or (0, 0), (codes, values), block, out.first, out.positions, out.old, out.new)
    else:
        native.merge(packer.unpack(streams[0], out.length * kind.width), out.new)
        out.positions[:] = np.arange(out.first, out.first + out.length)
        out.old[:] = block
