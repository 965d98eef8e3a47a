"""The staged file: what one engine rank writes into its live weights. The host agent makes it, the rank reads it.

The agent projects every change on the rank's live map (livemap.py): an HF position that the rank holds becomes one in a storage, once
for every place that holds it. Entries lie in one array of new bits for each element width, divided into segments:

    run=0   count entries at `offset + index` of a storage; their indices (uint32) follow one another in the index array from `at` on
    run=1   count consecutive elements from `offset` on; without indices (`at` is the next index all the same)

    header   magic, length and digest of the JSON; the JSON: version, parent, signature of the map; for each width where its arrays lie,
             `base` and `digest`
    arrays   for each width: segments [s], index uint32 [i], bits [n], each at a multiple of 64 bytes

`base` is the fingerprint of the old bits as one tensor named "staged" of n elements in this order: a rank that gathers what it is about
to overwrite and finds another number does not hold the parent. `digest` is the fingerprint of the three arrays. numpy only.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime.sync import fingerprint, native
from slime.sync.bursts import in_order
from slime.sync.livemap import LiveMap, LiveMove
from slime.sync.records import Changes

# Live memory of this process, as the kernels take it: entries [first, first + count) of the staged arrays of one width belong to the memory
# that begins at `address`. run=0: live[address + index[at + k] * width] is bits[first + k]; run=1: live[address + k * width] is.
SEGMENT = native.SEGMENT
# The same in a file: a storage of the live map and an offset in elements.
PLACE = np.dtype([("live", "<u4"), ("run", "<u4"), ("offset", "<u8"), ("first", "<u8"), ("count", "<u8"), ("at", "<u8")])

MAGIC = b"slime staged 1\n\0"
HEAD = struct.Struct("<16sQ16s")  # magic, bytes of the JSON, blake2b-128 of the JSON
ALIGN = 64
WINDOW = 1 << 32  # elements that an index reaches
RUN_AT = 512  # consecutive elements that are worth a segment of their own
CHUNK = 1 << 16  # elements that small pieces are joined to: a model has many tensors with a few changes each, and every call has its price
STRETCH = 1 << 22  # words that a thread hashes or writes at a time
MOST_HEADER = 1 << 20
BASE = "staged"


class StageError(ValueError):
    """A staged file that is not whole, or was not made for this rank."""


@dataclass(frozen=True, slots=True)
class StagedWidth:
    """The arrays of one element width."""

    width: int
    places: np.ndarray  # PLACE [s]
    index: np.ndarray  # uint32 [i]
    bits: np.ndarray  # [n]
    base: int

    def segments(self, addresses: np.ndarray) -> np.ndarray:
        """SEGMENT [s] for storages that begin at `addresses` (uint64, one a storage)."""
        found = np.zeros(len(self.places), SEGMENT)
        found["address"] = addresses[self.places["live"]] + self.places["offset"] * np.uint64(self.width)
        found["width"] = self.width
        for name in ("first", "count", "at", "run"):
            found[name] = self.places[name]
        return found


@dataclass(frozen=True, slots=True)
class Staged:
    """A staged file that was checked."""

    version: str
    parent: str
    widths: tuple[StagedWidth, ...]

    @property
    def entries(self) -> int:
        return sum(len(part.bits) for part in self.widths)

    @property
    def lives(self) -> frozenset[int]:
        """Storages that it writes to."""
        return frozenset(int(live) for part in self.widths for live in np.unique(part.places["live"]))


def project(moves: LiveMap, changes: Changes) -> Iterator[tuple[LiveMove, np.ndarray, int, np.ndarray, np.ndarray]]:
    """For every move of the tensor that holds a change: the move; positions (int64 [m], ascending) and what is to be added to each for that
    in the move's storage; old and new bits [m]. Where a move is one stretch they are views, and nothing was computed by element."""
    for number in moves.of_tensor.get(changes.tensor, ()):
        move = moves.moves[number]
        source, target = move.source, move.target
        first, last = np.searchsorted(changes.positions, (source.offset, source.end)).tolist()
        positions, old, new = (np.ascontiguousarray(array[first:last]) for array in (changes.positions, changes.old, changes.new))
        shift = target.offset - source.offset
        if source.strides != (1,) or target.strides != (1,):
            positions, old, new = native.project(positions, old, new, source, target)
            shift = 0
        if len(positions):
            yield move, positions, shift, old, new


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries of one segment: bits [m] at `offset` + index of a storage, or in a row from there on."""

    live: int
    offset: int
    index: np.ndarray | None  # uint32 [m]
    old: np.ndarray
    new: np.ndarray


class Stage:
    """Gathers the changes of a version for one rank and writes its staged file. Of old bits at most a chunk is kept at a time."""

    def __init__(self, moves: LiveMap, run_key: int) -> None:
        self._map = moves
        self._key = run_key
        self._table = fingerprint.table(run_key)
        self._widths: dict[int, _Gathered] = {}

    def pieces(self, changes: Changes) -> "list[Piece]":
        """What a tensor's changes are to be staged as. Nothing is gathered yet: any thread may do it beside others."""
        return [
            piece
            for move, positions, shift, old, new in project(self._map, changes)
            for run, stretches in _runs(positions)
            for piece in _pieces(move.live, run, shift, *(_joined([array[s] for s in stretches]) for array in (positions, old, new)))
        ]

    def add(self, pieces: "Iterable[Piece]") -> None:
        """Gather them; a tensor may come in several times, as long as no element comes twice."""
        for piece in pieces:
            width = self._map.lives[piece.live].width
            gathered = self._widths.get(width) or self._widths.setdefault(width, _Gathered(self._key, self._table))
            gathered.add(piece)

    def write(self, path: str | Path, version: str, parent: str) -> int:
        """Write the file, whole or not at all, and return its bytes. `version` and `parent` are labels."""
        arrays: list[tuple[int, list[np.ndarray]]] = []
        widths: dict[str, Any] = {}
        end = 0
        for width, gathered in sorted(self._widths.items()):
            columns = gathered.arrays()
            where: dict[str, Any] = {"base": f"{gathered.base():016x}", "digest": f"{digest(columns, self._key, self._table):016x}"}
            for name, pieces in columns.items():
                where[name] = [end, sum(map(len, pieces))]
                arrays.append((end, pieces))
                end += -(-sum(piece.nbytes for piece in pieces) // ALIGN) * ALIGN
            widths[str(width)] = where
        record = {"version": version, "parent": parent, "map": self._map.signature, "widths": widths, "bytes": end}
        header = json.dumps(record, separators=(",", ":")).encode()
        start = -(-(HEAD.size + len(header)) // ALIGN) * ALIGN
        partial = Path(f"{path}.partial")
        try:
            with open(partial, "wb+") as file:
                file.write(HEAD.pack(MAGIC, len(header), hashlib.blake2b(header, digest_size=16).digest()) + header)
                file.flush()
                _fill(file.fileno(), start + end, _placed(arrays, start))
            os.replace(partial, path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: a staged file of {start + end} bytes", str(partial)) from error
        finally:
            partial.unlink(missing_ok=True)  # where it failed: it has all its room already
        return start + end


class _Chunks:
    """An array that comes in pieces, the small ones of which are joined."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._small: list[np.ndarray] = []
        self.waiting = 0  # elements of small pieces that are not joined yet

    def add(self, piece: np.ndarray) -> None:
        if len(piece) >= CHUNK and self._small:
            self._join()
        self._small.append(piece)
        self.waiting += len(piece)
        if self.waiting >= CHUNK:
            self._join()

    def all(self) -> list[np.ndarray]:
        """All pieces so far, contiguous, in their order."""
        if self._small:
            self._join()
        return list(self._pieces)

    def take(self) -> list[np.ndarray]:
        """The same; they are forgotten."""
        taken = self.all()
        self._pieces = []
        return taken

    def _join(self) -> None:
        self._pieces.append(_joined(self._small))
        self._small, self.waiting = [], 0


class _Gathered:
    """Entries of one width."""

    def __init__(self, run_key: int, table: np.ndarray) -> None:
        self._key, self._table = fingerprint.tensor_key(run_key, BASE), table
        self._entries, self._indices = 0, 0
        self._base, self._based = 0, 0  # fingerprint of the old bits of so many entries
        self._places: list[tuple[int, int, int, int, int, int]] = []
        self._index, self._bits, self._old = _Chunks(), _Chunks(), _Chunks()

    def add(self, piece: Piece) -> None:
        self._places.append((piece.live, int(piece.index is None), piece.offset, self._entries, len(piece.new), self._indices))
        if piece.index is not None:
            self._index.add(piece.index)
            self._indices += len(piece.index)
        self._bits.add(piece.new)
        self._old.add(piece.old)
        self._entries += len(piece.new)
        if not self._old.waiting:
            self.base()

    def base(self) -> int:
        """Fingerprint of all old bits so far."""
        for old in self._old.take():
            self._base = (self._base + fingerprint.full(old, self._key, self._table, self._based)) % 2**64
            self._based += len(old)
        return self._base

    def arrays(self) -> dict[str, list[np.ndarray]]:
        return {"places": [np.array(self._places, PLACE)], "index": self._index.all(), "bits": self._bits.all()}


def digest(arrays: dict[str, list[np.ndarray]], run_key: int, table: np.ndarray) -> int:
    """Fingerprint of arrays that are given in pieces, read as bytes."""
    return sum(in_order(lambda stretch: fingerprint.full(stretch[0], stretch[1], table, stretch[2]), _stretches(arrays, run_key))) % 2**64


def _stretches(arrays: dict[str, list[np.ndarray]], run_key: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(words, key, number of the first): what threads take."""
    for name, pieces in arrays.items():
        key, start = fingerprint.tensor_key(run_key, f"{BASE}/{name}"), 0
        for piece in pieces:
            # a piece of elements wider than a byte is read in words of two bytes, so that it may begin anywhere but at an odd byte
            words = piece.view("u1" if piece.itemsize == 1 else "<u2")
            for first in range(0, len(words), STRETCH):
                yield words[first : first + STRETCH], key, start + first
            start += len(words)


def _placed(arrays: list[tuple[int, list[np.ndarray]]], start: int) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8, where they go), a stretch each, of arrays whose first piece is to lie so far behind `start`."""
    for offset, pieces in arrays:
        at = start + offset
        for piece in pieces:
            flat = piece.view(np.uint8)
            for first in range(0, len(flat), 2 * STRETCH):
                yield flat[first : first + 2 * STRETCH], at + first
            at += len(flat)


def _fill(file: int, size: int, placed: Iterable[tuple[np.ndarray, int]]) -> None:
    """Make the file so many bytes long and write these. By way of a mapping: threads that write to a file wait for one another. All room is
    taken first, for memory without room ends the process."""
    os.posix_fallocate(file, 0, size)
    with mmap.mmap(file, size) as mapped:

        def write(stretch: tuple[np.ndarray, int]) -> None:
            flat, at = stretch
            np.frombuffer(mapped, np.uint8, len(flat), at)[:] = flat

        for _ in in_order(write, placed):
            pass


def _runs(positions: np.ndarray) -> Iterator[tuple[bool, list[slice]]]:
    """Divide ascending positions into what is scattered, first, and long consecutive runs: (is a run, its entries)."""
    runs = native.runs(positions, RUN_AT).tolist()
    edges = [0, *(edge for run in runs for edge in run), len(positions)]
    between = [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    if between:
        yield False, between
    for start, end in runs:
        yield True, [slice(start, end)]


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """One after the other, contiguous; without a copy where there is one."""
    return np.concatenate(pieces) if len(pieces) > 1 else np.ascontiguousarray(pieces[0])


def _pieces(live: int, run: bool, shift: int, positions: np.ndarray, old: np.ndarray, new: np.ndarray) -> Iterator[Piece]:
    """Positions int64 [m], ascending, to each of which `shift` is added."""
    for first, last in _windows(positions, run):
        offset, index = int(positions[first]), None
        if not run:
            index = np.subtract(positions[first:last], offset, out=np.empty(last - first, "<u4"), casting="unsafe")  # below WINDOW
        yield Piece(live, offset + shift, index, old[first:last], new[first:last])


def _windows(positions: np.ndarray, run: bool) -> Iterator[tuple[int, int]]:
    """Divide ascending positions so that an index of 32 bits reaches each from the first of its part."""
    first = 0
    run = run or bool(positions[-1] - positions[0] < WINDOW)
    while first < len(positions):
        last = len(positions) if run else int(np.searchsorted(positions, positions[first] + WINDOW))
        yield first, last
        first = last


def read(path: str | Path, moves: LiveMap, run_key: int) -> Staged:
    """The file, with every length, count and index checked: what it returns writes inside the storages of `moves`, and nowhere else.

    Raises StageError naming what is wrong, OSError where there is no file. The arrays are views of the file.
    """
    size = os.stat(path).st_size
    if size < HEAD.size:
        raise StageError(f"{path} has {size} bytes, too few for a staged file")
    flat = np.memmap(path, np.uint8, "r")
    magic, length, check = HEAD.unpack(flat[: HEAD.size].tobytes())
    if magic != MAGIC or length > min(MOST_HEADER, size - HEAD.size):
        raise StageError(f"{path} is not a staged file")
    header = flat[HEAD.size : HEAD.size + length].tobytes()
    if hashlib.blake2b(header, digest_size=16).digest() != check:
        raise StageError(f"{path} has a damaged header")
    try:
        record = json.loads(header)
        if record["map"] != moves.signature:
            raise StageError(f"{path} was made for another live map; learn again")
        body = flat[-(-(HEAD.size + length) // ALIGN) * ALIGN :]
        table = fingerprint.table(run_key)
        widths = tuple(_width(body, int(width), where, moves, run_key, table) for width, where in record["widths"].items())
        return Staged(str(record["version"]), str(record["parent"]), widths)
    except StageError:
        raise
    except (AttributeError, KeyError, TypeError, OverflowError, ValueError) as error:
        raise StageError(f"{path} has a header that is not one: {type(error).__name__}: {error}") from error


def _width(body: np.ndarray, width: int, where: dict[str, Any], moves: LiveMap, run_key: int, table: np.ndarray) -> StagedWidth:
    if width not in (1, 2, 4, 8):
        raise StageError(f"elements of {width} bytes")
    places = _array(body, where["places"], PLACE)
    index = _array(body, where["index"], np.dtype("<u4"))
    bits = _array(body, where["bits"], np.dtype(f"<u{width}"))
    found = digest({"places": [places], "index": [index], "bits": [bits]}, run_key, table)
    if f"{found:016x}" != where["digest"]:
        raise StageError(f"the elements of {width} bytes are damaged")
    _check(places.copy(), index, len(bits), width, moves)
    return StagedWidth(width, places, index, bits, int(where["base"], 16))


def _array(body: np.ndarray, where: list[int], dtype: np.dtype) -> np.ndarray:
    start, count = where
    if not (isinstance(start, int) and isinstance(count, int) and 0 <= start <= len(body) and start % ALIGN == 0):
        raise StageError(f"an array lies at {where}")
    if not 0 <= count <= (len(body) - start) // dtype.itemsize:
        raise StageError(f"an array at {where} ends outside the file")
    return body[start : start + count * dtype.itemsize].view(dtype)


def _check(places: np.ndarray, index: np.ndarray, entries: int, width: int, moves: LiveMap) -> None:
    """Every entry belongs to one place, and every place lies in its storage."""
    sizes = np.array([live.size if live.width == width else 0 for live in moves.lives], np.int64)
    if (places["live"] >= len(sizes)).any() or (places["run"] > 1).any():
        raise StageError("a segment names no storage of this rank")
    limit = np.uint64(1 << 48)  # sums of three such numbers do not pass 2^63
    if any((places[name] >= limit).any() for name in ("offset", "first", "count", "at")) or (places["count"] == 0).any():
        raise StageError("a segment has an impossible count")
    first, count, at, offset = (places[name].astype(np.int64) for name in ("first", "count", "at", "offset"))
    scattered = places["run"] == 0
    indices = np.where(scattered, count, 0)
    if (first != _before(count)).any() or (at != _before(indices)).any() or count.sum() != entries or indices.sum() != len(index):
        raise StageError("segments do not cover the entries, each once")
    reach = count - 1
    if scattered.any():
        reach[scattered] = np.maximum.reduceat(index, at[scattered]).astype(np.int64)
    if (offset + reach >= sizes[places["live"]]).any():
        raise StageError("an index lies outside its storage")


def _before(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
