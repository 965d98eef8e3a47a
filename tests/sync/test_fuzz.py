"""Parts that were damaged at random or by someone who knows the format, decoded in a process of their own.

Old bits and payload each end where the process's memory ends, so that a read beyond them is the end of the process; the old bits cannot
be written. What comes out is a WireError or changes of this model."""

import ctypes
import json
import mmap
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from slime.sync import codec, native, records, wire
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.wire import HEAD, ROW, WireError, decode_part, describe_part, encode_part

SMALL_BLOCK = 512  # so that tensors of some thousand elements have several blocks
PAYLOADS = 5000  # in each of two processes
PAGE = mmap.PAGESIZE
NUMBERS = (0, 1, 7, 8, 254, 255, 256, 511, 512, 513, 0x7FFFFFFF, 0xFFFFFFFF)


@pytest.mark.e2e
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_parts(seed: int) -> None:
    done = subprocess.run([sys.executable, __file__, str(seed)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert sum(count for name, count in found.items() if ":" in name) == PAYLOADS
    for way in WAYS:
        assert found[f"{way.__name__}: refused"] > 0, found
    assert found["flip_stream: decoded"] > 0 and found["change_row: refused"] > found.get("change_row: decoded", 0), found


class Guarded:
    """Memory after whose last byte nothing can be read."""

    def __init__(self, size: int) -> None:
        pages = -(-size // PAGE)
        self.map = mmap.mmap(-1, (pages + 1) * PAGE)
        self.bytes = np.frombuffer(self.map, np.uint8)[: pages * PAGE]
        self.address = self.bytes.ctypes.data
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address + pages * PAGE), PAGE, 0) == 0

    def tail(self, size: int) -> np.ndarray:
        return self.bytes[len(self.bytes) - size :]

    def freeze(self) -> None:
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address), len(self.bytes), mmap.PROT_READ) == 0


def make_model() -> ModelSpec:
    sizes = {"bfloat16": 1500, "float32": 600, "float8_e4m3fn": 1030, "float64": 513, "int16": 512, "bool": 40}
    return ModelSpec(tuple(TensorSpec(f"w.{name}", (size,), name) for name, size in sizes.items()))


def make_payloads(model: ModelSpec, olds: list[np.ndarray]) -> list[bytes]:
    """Of every method."""
    numbers = np.random.default_rng(0)
    payloads = []
    for density in (0.002, 0.05, 0.5, 1):
        for name in codec.CODECS:
            changes = []
            for i, old in enumerate(olds):
                new = np.where(numbers.random(len(old)) < density, old + old.dtype.type(1), old)
                if density > 0.01:
                    new[::97] = old[::97] ^ old.dtype.type(0x55)
                positions = np.arange(len(old)) if density == 1 or name == "dense" else native.diff(old, new)
                changes.append(Changes(i, positions, old[positions], new[positions]))
            payloads.append(encode_part(model, range(len(olds)), changes, name, olds.__getitem__))
    methods = Counter(block.codec for payload in payloads for block in describe_part(model, range(len(olds)), payload))
    assert set(methods) == set(codec.METHODS.values()), methods
    return payloads


def flip_bits(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(payload)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def truncate(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    return payload[: chance.randrange(len(payload))]


def splice(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    begin, end = sorted((chance.randrange(len(payload)), chance.randrange(len(payload))))
    return payload[:begin] + other[begin : end + chance.choice((0, 0, 1))] + payload[end:]


def taken_apart(payload: bytes) -> tuple[np.ndarray, list[list[bytes]]]:
    """Rows, and the streams of each."""
    count, packed = HEAD.unpack_from(payload)[-2:]
    planes = codec.Packer().unpack(memoryview(payload)[HEAD.size : HEAD.size + packed], count * ROW.itemsize)
    rows = planes.reshape(ROW.itemsize, count).T.copy().reshape(-1).view(ROW)
    streams, at = [], HEAD.size + packed
    for sizes in rows["sizes"].tolist():
        streams.append([payload[at + sum(sizes[:i]) : at + sum(sizes[: i + 1])] for i in range(len(sizes))])
        at += sum(sizes)
    return rows, streams


def put_together(payload: bytes, rows: np.ndarray, streams: list[list[bytes]], keep_sizes: bool = False) -> bytes:
    """A part whose head and table are whole and tell the lengths of these streams."""
    if not keep_sizes:
        rows["sizes"] = [[len(stream) for stream in of] for of in streams]
    table = rows.view(np.uint8).reshape(len(rows), ROW.itemsize).T.copy().tobytes()
    head = HEAD.pack(*HEAD.unpack_from(payload)[:-2], len(rows), len(table))
    return b"".join([head, table, *(stream for of in streams for stream in of)])


def change_row(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    """A number of a row is another; sometimes the lengths are not told again."""
    rows, streams = taken_apart(payload)
    row, field = rows[chance.randrange(len(rows)) :][:1], chance.choice(("tensor", "block", "method", "changed", "gaps", "sizes"))
    near = [int(np.ravel(row[field][0])[0]) + d for d in (-2, -1, 1, 2)]
    value = chance.choice([*NUMBERS, *near, *near]) % (1 << (8 if field == "method" else 32))
    if field == "sizes":
        row[field][0, chance.randrange(codec.STREAMS)] = value
    else:
        row[field] = value
    return put_together(payload, rows, streams, keep_sizes=field == "sizes")


def change_rows_order(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    """A row comes twice, is missing, or stands elsewhere, its streams with it."""
    rows, streams = taken_apart(payload)
    order = list(range(len(rows)))
    i, j = chance.randrange(len(rows)), chance.randrange(len(rows))
    chance.choice((lambda: order.insert(j, i), lambda: order.pop(i), lambda: order.insert(j, order.pop(i))))()
    return put_together(payload, rows[order], [streams[k] for k in order])


def raw_of(stream: bytes) -> bytes:
    """What was packed, or the stream itself where nothing was."""
    try:
        size = zstandard.get_frame_parameters(stream, format=zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
        return codec.Packer().unpack(memoryview(stream), size).tobytes() if len(stream) < size < 1 << 16 else stream
    except (zstandard.ZstdError, ValueError):
        return stream


def flip_stream(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    """What a stream says is damaged, cut or longer, and packed again: nothing but its meaning can tell."""
    rows, streams = taken_apart(payload)
    for _ in range(chance.choice((1, 1, 3))):
        of = chance.choice([of for of in streams if any(of)])
        i = chance.choice([i for i, stream in enumerate(of) if stream])
        raw = bytearray(raw_of(of[i]))
        kind = chance.random()
        if kind < 0.7:
            for _ in range(chance.choice((1, 1, 4, 32))):
                raw[chance.randrange(len(raw))] = chance.choice((0, 255, 254, chance.randrange(256)))
        elif kind < 0.85:
            del raw[chance.randrange(len(raw)) :]
        else:
            raw.extend(chance.choice((0, 255)) for _ in range(chance.randrange(1, 40)))
        of[i] = codec.Packer().pack(np.frombuffer(bytes(raw), np.uint8)) if raw else b""
    return put_together(payload, rows, streams)


def exchange_streams(payload: bytes, other: bytes, chance: random.Random) -> bytes:
    """A stream of another block."""
    rows, streams = taken_apart(payload)
    a, b, i = chance.randrange(len(rows)), chance.randrange(len(rows)), chance.randrange(codec.STREAMS)
    streams[a][i], streams[b][i] = streams[b][i], streams[a][i]
    return put_together(payload, rows, streams)


WAYS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    flip_bits,
    truncate,
    splice,
    change_row,
    change_rows_order,
    flip_stream,
    exchange_streams,
)


def check(model: ModelSpec, found: Changes, olds: list[np.ndarray]) -> None:
    old, n = olds[found.tensor], len(found)
    assert len(found.old) == len(found.new) == n and 0 < n <= len(old) and found.new.dtype == old.dtype
    assert (np.diff(found.positions) > 0).all() and found.positions[0] >= 0 and found.positions[-1] < len(old)
    assert np.array_equal(found.old, old[found.positions])


def main(seed: int) -> None:
    records.BLOCK = wire.BLOCK = SMALL_BLOCK
    model, numbers, chance = make_model(), np.random.default_rng(seed), random.Random(seed)
    tensors = range(len(model.tensors))
    kept = [Guarded(tensor.nbytes) for tensor in model.tensors]
    olds = []
    for tensor, guarded in zip(model.tensors, kept, strict=True):
        values = (numbers.standard_normal(tensor.size) * 0.02).astype(np.float32).view(np.uint8)
        guarded.tail(tensor.nbytes)[:] = np.resize(values, tensor.nbytes)
        guarded.freeze()
        olds.append(guarded.tail(tensor.nbytes).view(tensor.type.bits))
    payloads = make_payloads(model, olds)
    room = Guarded(2 * max(map(len, payloads)))
    counts: Counter[str] = Counter()
    for i in range(PAYLOADS):
        way = WAYS[i % len(WAYS)]
        damaged = way(chance.choice(payloads), chance.choice(payloads), chance)
        view = room.tail(len(damaged))
        view[:] = np.frombuffer(damaged, np.uint8)
        try:
            for found in decode_part(model, tensors, view.data, olds.__getitem__):
                check(model, found, olds)
            counts[f"{way.__name__}: decoded"] += 1
        except WireError:
            counts[f"{way.__name__}: refused"] += 1
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
