"""A part of a publication as bytes: the changes of a run of tensors.

    head     <4s H H 16s I I I I>: magic "SLWP", version, 0, model signature, first tensor, tensor after the last, rows, bytes of the table
    table    ROW [rows], ascending by (tensor, block), a row for each block that has changes; as byte planes through zstd, raw where that is
             no shorter
    streams  of every row in turn, the lengths being its `sizes`; see codec.py

Blocks are records.BLOCK elements, tensors and dtypes are the ModelSpec's, whose signature is in the head. There is no checksum: the
manifest has a digest of the part. A decoder nevertheless trusts nothing: it checks every number against the model and the length of the
payload before it uses it, so that neither damage nor malice makes it read or write elsewhere, or allocate more than a few times what the
part's tensors have.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slime.sync import native
from slime.sync.codec import (
    CODECS,
    DENSE,
    METHODS,
    STEPS8,
    STEPS16,
    STREAMS,
    USED,
    Coded,
    Entries,
    PackedSteps,
    Packer,
    decode_block,
    encode_block,
    gaps_stay,
    most_gaps,
)
from slime.sync.native import NativeError, StepsError
from slime.sync.records import BLOCK, Changes, ModelSpec, TensorSpec

MAGIC, VERSION = b"SLWP", 1
HEAD = struct.Struct("<4sHH16sIIII")
ROW = np.dtype(
    [("tensor", "<u4"), ("block", "<u4"), ("method", "u1"), ("changed", "<u4"), ("gaps", "<u4"), ("sizes", "<u4", (STREAMS,))]
)  # changed: entries that the block yields; gaps: raw bytes of a gap stream
_USED = np.array([[stream in USED.get(method, ()) for stream in range(STREAMS)] for method in range(max(METHODS) + 1)])  # by method
DENSE_AT = 0.3  # share of a block's elements above which the publisher lists them all


class WireError(ValueError):
    """Bytes that are no part of this model."""


@dataclass(frozen=True, slots=True)
class PartBlock:
    """What a part says of one block. `nbytes` without its row in the table."""

    tensor: str
    block: int
    codec: str
    changed: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Coded blocks: what becomes rows and streams of a part."""

    rows: np.ndarray  # ROW [n], ascending by (tensor, block)
    places: np.ndarray  # uint64 [n, STREAMS], address of each stream, whose size is in the row
    memory: tuple[object, ...]  # where the streams lie

    @classmethod
    def of(cls, rows: np.ndarray, streams: np.ndarray) -> "Blocks":
        """From the streams of every row in turn, uint8."""
        ends = np.cumsum(rows["sizes"].astype(np.uint64)).reshape(-1, STREAMS)
        return cls(rows, streams.ctypes.data + ends - rows["sizes"], (streams,))

    def of_tensors(self, tensors: range) -> "Blocks":
        """The blocks of these tensors."""
        those = slice(*np.searchsorted(self.rows["tensor"], (tensors.start, tensors.stop)).tolist())
        return Blocks(self.rows[those], self.places[those], self.memory)

    def by_tensor(self) -> "Iterator[tuple[int, Blocks]]":
        for tensor in np.unique(self.rows["tensor"]).tolist():
            yield tensor, self.of_tensors(range(tensor, tensor + 1))

    def streams(self) -> np.ndarray:
        """uint8, of every row in turn."""
        sizes = self.rows["sizes"].astype(np.uint64).reshape(-1)
        out = np.empty(int(sizes.sum()), np.uint8)
        native.collect(self.places.reshape(-1), sizes, out)
        return out


@dataclass(frozen=True, slots=True)
class Streams:
    """Blocks in steps, ascending by (tensor, block), none of their streams through zstd yet."""

    tensor: np.ndarray  # int64 [n]
    block: np.ndarray  # int64 [n]
    changed: np.ndarray  # int64 [n], entries
    length: np.ndarray  # int64 [n], elements
    streams: np.ndarray  # uint8, of every block in turn
    sizes: np.ndarray  # int64 [n, STREAMS], bytes of each
    two_bytes: np.ndarray  # bool [n], whether gaps have two

    def pack(self, threads: int) -> Blocks:
        """As they travel: streams through zstd where that makes them shorter, on so many threads."""
        flat, left = self.sizes.reshape(-1), np.zeros(self.sizes.shape, bool)
        left[:, 0] = gaps_stay(self.changed, self.length)
        short = Packer().pack_all(self.streams, np.cumsum(flat) - flat, flat, left.reshape(-1), threads)
        rows = np.zeros(len(self.sizes), ROW)
        rows["tensor"], rows["block"], rows["changed"] = self.tensor, self.block, self.changed
        rows["method"], rows["gaps"] = np.where(self.two_bytes, STEPS16, STEPS8), self.sizes[:, 0]
        rows["sizes"] = short.sizes.reshape(-1, STREAMS)
        return Blocks(rows, short.addresses.reshape(-1, STREAMS), short.memory)


def encode_part(
    model: ModelSpec, tensors: range, changes: Sequence[Changes], codec: str, old_of: Callable[[int], np.ndarray] | None = None
) -> bytes:
    """The changes of these tensors, ascending by tensor; tensors without changes may be absent. The bytes depend on the arguments alone.

    codec: "steps"; "exponent", which needs old_of(tensor), all old bits (1-D) of a tensor that has changes; "dense", for weights of
    which whoever decodes has no old ones: all elements of a block that has any must be listed. Raises ValueError for changes that are not
    of these tensors."""
    return lay_out(model, tensors, [encode_blocks(model, tensors, changes, codec, old_of)]).join()


def encode_blocks(
    model: ModelSpec, tensors: range, changes: Sequence[Changes], codec: str, old_of: Callable[[int], np.ndarray] | None = None
) -> Blocks:
    """The blocks of `encode_part`, which says what the arguments are."""
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    if codec == "exponent" and old_of is None:
        raise ValueError("codec 'exponent' needs old_of, all old bits of a tensor: where they are not at hand, take 'steps'")
    packer, last = Packer(), tensors.start - 1
    rows: list[tuple[int, int, int, int, int, list[int]]] = []
    streams: list[bytes] = []
    for change in changes:
        if not last < change.tensor < tensors.stop:
            raise ValueError(f"changes of tensor {change.tensor} after those of {last} in a part of tensors {_named(tensors)}")
        last = change.tensor
        block_bits = old_of(last) if codec == "exponent" and old_of is not None and len(change) else None
        for block, coded in _encode_tensor(model, change, codec, block_bits, packer):
            sizes = [len(stream) for stream in coded.streams]
            rows.append((last, block, coded.method, coded.changed, coded.gaps, sizes + [0] * (STREAMS - len(sizes))))
            streams.extend(coded.streams)
    return Blocks.of(np.array(rows, ROW), np.frombuffer(b"".join(streams), np.uint8))


@dataclass(frozen=True, slots=True)
class Layout:
    """A part as the stretches of memory that become it."""

    addresses: np.ndarray  # uint64 [n]
    sizes: np.ndarray  # uint64 [n]
    memory: tuple[object, ...]  # where they lie

    def join(self) -> bytes:
        """In a loop that other threads need not wait for."""
        return native.joined(self.addresses, self.sizes)


def lay_out(model: ModelSpec, tensors: range, found: Sequence[Blocks]) -> Layout:
    """The part of these tensors of which `found` has all blocks that changed, each once."""
    rows = np.concatenate([np.zeros(0, ROW), *(blocks.rows for blocks in found)])
    places = np.concatenate([np.zeros((0, STREAMS), np.uint64), *(blocks.places for blocks in found)])
    order = np.lexsort((rows["block"], rows["tensor"]))
    rows, places = rows[order], places[order]
    planes = rows.view(np.uint8).reshape(len(rows), ROW.itemsize).T.copy().reshape(-1)
    table = Packer().pack(planes)
    signature = bytes.fromhex(model.signature)
    head = HEAD.pack(MAGIC, VERSION, 0, signature, tensors.start, tensors.stop, len(rows), len(table)) + table
    first = np.frombuffer(head, np.uint8)
    addresses = np.append(np.uint64(first.ctypes.data), places.reshape(-1))
    sizes = np.append(np.uint64(len(first)), rows["sizes"].astype(np.uint64).reshape(-1))
    return Layout(addresses, sizes, (head, *found))


def _encode_tensor(model: ModelSpec, change: Changes, codec: str, old: np.ndarray | None, packer: Packer) -> Iterator[tuple[int, Coded]]:
    """(block, its coding) of every block that has changes."""
    spec = model.tensors[change.tensor]
    bits = spec.type.bits
    typed = change.positions.dtype == np.int64 and change.old.dtype == change.new.dtype == bits
    if not typed or not len(change) == len(change.old) == len(change.new):
        raise ValueError(f"changes of {spec.name} are not int64 positions and as many {bits} bits of {spec.dtype}")
    if old is not None:
        _check_old(spec.name, old, bits, spec.size)
    edges = np.searchsorted(change.positions, np.arange(spec.blocks + 1) * BLOCK)
    if edges[0] or edges[-1] != len(change) or (len(change) and not 0 <= change.positions[-1] < spec.size):
        raise ValueError(f"positions of {spec.name} are not ascending between 0 and {spec.size - 1}")
    for block in np.flatnonzero(np.diff(edges)).tolist():
        first, those = block * BLOCK, slice(edges[block], edges[block + 1])
        length = min(BLOCK, spec.size - first)
        entries = Entries(first, length, *(np.ascontiguousarray(x[those]) for x in (change.positions, change.old, change.new)))
        try:
            coded = encode_block(
                spec.type, entries, codec, None if old is None else np.ascontiguousarray(old[first : first + length]), packer
            )
        except ValueError as error:
            raise ValueError(f"changes of block {block} of {spec.name}: {error}") from error
        if coded is not None:
            yield block, coded


def _check_old(name: str, old: np.ndarray, bits: np.dtype, size: int) -> None:
    if old.dtype != bits or old.shape != (size,):
        raise ValueError(f"the old bits of {name} are {old.dtype} {list(old.shape)}, not {bits} [{size}]")


@dataclass(frozen=True, slots=True)
class _Unpacked:
    """What a part says of one tensor, its steps out of zstd."""

    spec: TensorSpec
    tensor: int
    rows: np.ndarray  # ROW [n], ascending
    begins: np.ndarray  # int64 [n, STREAMS], where the row's streams begin in the part
    in_steps: np.ndarray  # bool [n]
    steps: np.ndarray  # STEPS_BLOCK [n], for the rows in steps
    memory: tuple[np.ndarray, ...]  # where their streams lie, first the part (uint8)

    def changes(self, old: np.ndarray) -> Changes:
        """With absolute new bits; a dense block gives all its elements. `old`: the tensor's old bits (1-D), which are only read. Raises
        WireError, naming tensor and block."""
        kind = self.spec.type
        _check_old(self.spec.name, old, kind.bits, self.spec.size)
        n = int(self.rows["changed"].sum(dtype=np.int64))
        found, done = Changes(self.tensor, np.empty(n, np.int64), np.empty(n, kind.bits), np.empty(n, kind.bits)), 0
        for those in self._alike(old.flags.c_contiguous):
            room = slice(done, done := done + int(self.rows["changed"][those].sum(dtype=np.int64)))
            self._decode(those, old, found.positions[room], found.old[room], found.new[room])
        return found

    def _alike(self, contiguous: bool) -> Iterator[slice]:
        """Rows that are decoded together: neighbours in steps where the old bits are `contiguous`, otherwise one by one."""
        together = self.in_steps[1:] & self.in_steps[:-1] & contiguous
        edges = [0, *(np.flatnonzero(~together) + 1).tolist(), len(self.rows)]
        yield from map(slice, edges[:-1], edges[1:])

    def _decode(self, those: slice, old: np.ndarray, *room: np.ndarray) -> None:
        """Blocks in steps, or one of another method. `room`: positions, old and new bits of their changes."""
        kind, rows = self.spec.type, self.rows[those]
        start, end = int(rows["block"][0]) * BLOCK, min((int(rows["block"][-1]) + 1) * BLOCK, self.spec.size)
        bits = np.ascontiguousarray(old[start:end])  # all that they read
        try:
            if self.in_steps[those.start]:
                native.steps_decode(kind.exponent is not None, self.steps[those], bits, start, *room)
            else:
                ends = zip(self.begins[those][0].tolist(), rows["sizes"][0].tolist(), strict=True)
                streams = [self.memory[0][at : at + size].data for at, size in ends]
                decode_block(kind, int(rows["method"][0]), streams, bits, Entries(start, end - start, *room), Packer())
        except NativeError as error:
            raise _wrong(self.spec, rows[error.number if isinstance(error, StepsError) else 0], error) from error


def decode_part(model: ModelSpec, tensors: range, payload: bytes | memoryview, old_of: Callable[[int], np.ndarray]) -> Iterator[Changes]:
    """Changes of each tensor that has any, ascending. old_of(tensor): its old bits. Raises WireError for bytes that are no part of these
    tensors; a tensor is yielded when all of it was checked, the first one when the table and the lengths of all streams were."""
    for unpacked in _unpack(model, tensors, payload):
        yield unpacked.changes(old_of(unpacked.tensor))


def _unpack(model: ModelSpec, tensors: range, payload: bytes | memoryview) -> list[_Unpacked]:
    """Each tensor that has changes, ascending. Raises WireError, naming tensor and block, for bytes that are no part of these tensors."""
    view, packer = memoryview(payload).cast("B"), Packer()
    rows, begin = _table(model, tensors, view, packer)
    sizes = rows["sizes"].astype(np.int64)
    begins = (begin + np.cumsum(sizes) - sizes.reshape(-1)).reshape(sizes.shape)
    in_steps = np.isin(rows["method"], (STEPS8, STEPS16))
    flat, steps = np.frombuffer(view, np.uint8), np.zeros(len(rows), native.STEPS_BLOCK)
    packed = _packed_steps(model, rows, flat, begins, sizes, in_steps)
    try:
        raw = packed.unpack(packer)
    except StepsError as error:
        row = rows[in_steps][error.number]
        raise _wrong(model.tensors[row["tensor"]], row, error) from error
    steps[in_steps] = raw.blocks
    numbers, starts = np.unique(rows["tensor"], return_index=True)
    edges = [*starts.tolist(), len(rows)]
    return [
        _Unpacked(model.tensors[i], i, rows[start:end], begins[start:end], in_steps[start:end], steps[start:end], raw.memory)
        for i, start, end in zip(numbers.tolist(), edges[:-1], edges[1:], strict=True)
    ]


def _packed_steps(
    model: ModelSpec, rows: np.ndarray, payload: np.ndarray, begins: np.ndarray, sizes: np.ndarray, those: np.ndarray
) -> PackedSteps:
    """The blocks in steps among the rows, whose streams lie in the payload (uint8) at begins, so many bytes each."""
    rows = rows[those]
    first = rows["block"].astype(np.int64) * BLOCK
    widths, lengths = (_by_tensor(model, rows["tensor"], of) for of in (lambda spec: spec.type.width, lambda spec: spec.size))
    changed, gaps = (rows[name].astype(np.int64) for name in ("changed", "gaps"))
    length = np.minimum(lengths - first, BLOCK)
    return PackedSteps(payload, begins[those], sizes[those], rows["method"] == STEPS16, changed, gaps, widths, first, length)


def _by_tensor(model: ModelSpec, tensors: np.ndarray, of: Callable[[TensorSpec], int]) -> np.ndarray:
    """int64: a number of each of these tensors, which ascend."""
    numbers, counts = np.unique(tensors, return_counts=True)
    return np.repeat(np.array([of(model.tensors[i]) for i in numbers], np.int64), counts)


def _wrong(spec: TensorSpec, row: np.ndarray, error: NativeError) -> WireError:
    return WireError(f"block {row['block']} of {spec.name} ({METHODS[int(row['method'])]}): {error}")


def describe_part(model: ModelSpec, tensors: range, payload: bytes | memoryview) -> list[PartBlock]:
    """What a part says of each block. Raises WireError as `decode_part`, but looks into no stream."""
    rows, _ = _table(model, tensors, memoryview(payload).cast("B"), Packer())
    sizes = rows["sizes"].sum(axis=1, dtype=np.uint64).tolist()
    named = zip(rows["tensor"].tolist(), rows["block"].tolist(), rows["method"].tolist(), rows["changed"].tolist(), sizes, strict=True)
    return [PartBlock(model.tensors[t].name, block, METHODS[method], changed, size) for t, block, method, changed, size in named]


def _table(model: ModelSpec, tensors: range, view: memoryview, packer: Packer) -> tuple[np.ndarray, int]:
    """The rows of a part (ROW), checked, and where its streams begin."""
    if len(view) < HEAD.size:
        raise WireError(f"a part of {len(view)} bytes: shorter than its head")
    magic, version, zero, signature, start, stop, count, packed = HEAD.unpack_from(view)
    if magic != MAGIC or zero:
        raise WireError("these bytes are no part of a publication")
    if version != VERSION:
        raise WireError(f"a part in format {version}; this slime reads {VERSION}")
    if signature.hex() != model.signature:
        raise WireError(f"a part of model {signature.hex()}, not of {model.signature}")
    if range(start, stop) != tensors:
        raise WireError(f"a part of tensors {_named(range(start, stop))}, not of {_named(tensors)}")
    most = sum(model.tensors[i].blocks for i in tensors)
    if count > most or packed > len(view) - HEAD.size:
        raise WireError(f"a table of {count} rows in {packed} bytes: there are {most} blocks, and {len(view)} bytes in all")
    begin = HEAD.size + packed
    try:
        planes = packer.unpack(view[HEAD.size : begin], count * ROW.itemsize)
    except NativeError as error:
        raise WireError(f"the table of a part: {error}") from error
    rows = np.ascontiguousarray(planes.reshape(ROW.itemsize, count).T).reshape(-1).view(ROW)
    _check_rows(model, tensors, rows, len(view) - begin)
    return rows, begin


def _named(tensors: range) -> str:
    return f"{tensors.start}:{tensors.stop}"


def _check_rows(model: ModelSpec, tensors: range, rows: np.ndarray, nbytes: int) -> None:
    told = rows["sizes"].sum(dtype=np.uint64)
    if told != nbytes:
        raise WireError(f"a part has {nbytes} bytes of streams where its table tells {told}")
    tensor, block, method, changed, gaps = (rows[name].astype(np.int64) for name in ROW.names[:-1])  # type: ignore[index]
    placed = (tensor >= tensors.start) & (tensor < tensors.stop) & (np.diff(tensor << 32 | block, prepend=-1) > 0)
    if len(wrong := np.flatnonzero(~placed)):
        this, last = ((int(tensor[i]), int(block[i])) if i >= 0 else (-1, -1) for i in (wrong[0], wrong[0] - 1))
        raise WireError(f"a row of (tensor, block) {this} after {last} in a part of tensors {_named(tensors)}")
    length = np.minimum(_by_tensor(model, tensor, lambda spec: spec.size) - block * BLOCK, BLOCK)
    least = np.where(method == DENSE, length, 1)
    possible = (length >= 1) & np.isin(method, list(METHODS)) & (least <= changed) & (changed <= length)
    if len(wrong := np.flatnonzero(~possible | (gaps > most_gaps(method, changed, length)))):
        i, name = wrong[0], model.tensors[tensor[wrong[0]]].name
        raise WireError(
            f"block {block[i]} of {name}: method {method[i]} with {changed[i]} changes of {length[i]} elements and {gaps[i]} gap bytes"
        )
    if len(wrong := np.flatnonzero((~_USED[method] & (rows["sizes"] > 0)).any(axis=1))):
        row = rows[wrong[0]]
        name = model.tensors[row["tensor"]].name
        raise WireError(f"block {row['block']} of {name} has streams that {METHODS[int(row['method'])]} does not have")
