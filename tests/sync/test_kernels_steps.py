"""What differs, listed and coded as steps, against numpy and against the encoder that takes one block at a time.

The same tests run on compiled C, on the Triton programs interpreted on the CPU (TRITON_INTERPRET=1, which a test here starts), and on a GPU
(SLIME_TEST_DEVICE=cuda).
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.sync import codec, fingerprint, native, wire
from slime.sync.codec import STEPS16, STREAMS, Entries, Packer
from slime.sync.kernels import diff
from slime.sync.kernels.diff import Diff, Stretches
from slime.sync.kernels.steps import Blocks, Steps
from slime.sync.records import BLOCK, ELEMENT_TYPES, ModelSpec, TensorSpec

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLE = fingerprint.table(0xF00DFACE)
TYPES = {"bfloat16": torch.int16, "float32": torch.int32, "float64": torch.int64, "float8_e4m3fn": torch.uint8, "int16": torch.int16}


def bits(name, n, seed=0):
    """Random bits: NaNs with payloads, subnormals, zeros of both signs."""
    return np.random.default_rng(seed).integers(0, 256, n * ELEMENT_TYPES[name].width, dtype=np.uint8).view(ELEMENT_TYPES[name].bits)


@dataclass
class Case:
    """A memory and where blocks lie in it: rows of (offset, block, first, count)."""

    name: str  # of an element type
    old: np.ndarray
    new: np.ndarray
    rows: list[tuple[int, int, int, int]]

    def diff(self) -> tuple[Diff, list[torch.Tensor], list[torch.Tensor]]:
        held, live = (
            torch.from_numpy(side.view(np.uint8).copy()).to(DEVICE).view(TYPES[self.name])
            for side in (self.old, self.new)  # bits
        )
        offset, block, first, count = np.array(self.rows, np.int64).reshape(-1, 4).T
        widths = np.array([self.old.itemsize])
        return Diff(Stretches(np.zeros_like(offset), offset, block, first, count), widths, DEVICE), [live], [held]

    def blocks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Old and new bits of every block."""
        found: dict[int, list[slice]] = {}
        for offset, block, _, count in self.rows:
            found.setdefault(block, []).append(slice(offset, offset + count))
        return [(np.concatenate([self.old[s] for s in those]), np.concatenate([self.new[s] for s in those])) for those in found.values()]


def whole(name, old, new, length=None):
    """One block after the other."""
    length = length or len(old)
    return Case(name, old, new, [(at, n, 0, min(length, len(old) - at)) for n, at in enumerate(range(0, len(old), length))])


def stepped(name, old, at, steps):
    """The bits that are so many units in the last place away."""
    kind, new = ELEMENT_TYPES[name], old.copy()
    sign = np.uint64(1 << (8 * kind.width - 1))
    low = sign - np.uint64(1)

    def key(b):
        b = b.astype(np.uint64)
        return np.where(b & sign, low - (b & low), b | sign) if kind.exponent else b

    moved = (key(old[at]) + np.asarray(steps, np.int64).astype(np.uint64)) & (low | sign)
    back = np.where(moved & sign, moved & low, (low - (moved & low)) | sign) if kind.exponent else moved
    new[at] = back.astype(kind.bits)
    return new


def sparse(name, n, share, seed=0):
    """Steps of mostly one unit, some of them far."""
    g, old = np.random.default_rng(seed), bits(name, n, seed)
    at = np.flatnonzero(g.random(n) < share)
    steps = g.choice([-1, 1], len(at)) * g.choice([1, 1, 1, 1, 1, 1, 2, 3, 40, 256, 257, 258], len(at))
    return old, stepped(name, old, at, steps % 100 if ELEMENT_TYPES[name].width == 1 else steps)


def edges(name, at, n=40_000):
    old = bits(name, n)
    return whole(name, old, stepped(name, old, np.array(at, np.int64), np.ones(len(at), np.int64)))


GAPS = [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 0, 0]
FAR_GAPS = [65534, 65535, 65536, 131069, 131070, 131071, 0]
OTHER = np.random.default_rng(9)

CASES = {
    "random": whole("bfloat16", *sparse("bfloat16", 100_000, 0.012)),
    "several blocks": whole("bfloat16", *sparse("bfloat16", 100_000, 0.05, seed=1), length=30_000),
    "rare: gaps of two bytes": whole("bfloat16", *sparse("bfloat16", 200_000, 0.001, seed=2)),
    "fp32": whole("float32", *sparse("float32", 50_000, 0.02, seed=3), length=17_000),
    "fp64": whole("float64", *sparse("float64", 20_000, 0.02, seed=4)),
    "fp8": whole("float8_e4m3fn", *sparse("float8_e4m3fn", 70_001, 0.02, seed=5), length=33_001),
    "integers": whole("int16", *sparse("int16", 30_000, 0.3, seed=6)),
    "all changed, to anything": whole("bfloat16", bits("bfloat16", 9_001), bits("bfloat16", 9_001) ^ np.uint16(0x4001)),
    "nothing": whole("bfloat16", bits("bfloat16", 5000), bits("bfloat16", 5000), length=3000),
    "one element": edges("bfloat16", [12_345]),
    "first and last": edges("bfloat16", [0, 39_999]),
    "the first alone": edges("float32", [0], 1),
    "escapes": edges("bfloat16", np.cumsum(np.array(GAPS) + 1) - 1, 4000),
    "escapes of two bytes": edges("bfloat16", np.cumsum(np.array(FAR_GAPS) + 1) - 1, 600_000),
    "a span's edges": edges("bfloat16", [diff.SPAN - 1, diff.SPAN, diff.SPAN + diff.STEP - 1, diff.SPAN + diff.STEP]),
    "zeros and NaNs": whole(
        "bfloat16",
        np.array([0x0000, 0x8000, 0x7FC0, 0x7FC1, 0xFFFF, 0x0001, 0x8001, 0x7F80], np.uint16),
        np.array([0x8000, 0x0000, 0x7FC1, 0xFFC1, 0x0000, 0x8001, 0x0000, 0x7F81], np.uint16),
    ),
    "stretches in another order, unaligned": Case(
        "bfloat16", *sparse("bfloat16", 50_000, 0.05, seed=7), [(40_001, 0, 0, 9_000), (3, 0, 9_000, 17_003), (17_100, 1, 0, 13)]
    ),
    "many tiles of a block": whole("bfloat16", *sparse("bfloat16", 60_000, 0.2, seed=8)),
}


def entries(old, new):
    at = np.flatnonzero(old != new)
    return at, old[at], new[at]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_differs_is_counted_and_listed(case):
    compared, live, held = case.diff()
    counts = compared.count(live, held)
    expected = [entries(*block) for block in case.blocks()]
    assert counts.dtype == np.int64 and counts.tolist() == [len(at) for at, _, _ in expected]
    listed = compared.entries(np.arange(compared.blocks))
    assert listed.counts.tolist() == counts.tolist()
    for found, those in zip(listed.on_host(), zip(*expected, strict=True), strict=True):
        assert found.tolist() == np.concatenate(those).tolist()
    last = compared.entries(np.array([compared.blocks - 1]), everything=True)
    old, new = case.blocks()[-1]
    assert [found.tolist() for found in last.on_host()] == [list(range(len(old))), old.tolist(), new.tolist()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_are_coded_as_one_at_a_time(case):
    """Every stream, before and after zstd, and the fingerprints."""
    compared, live, held = case.diff()
    changed = np.flatnonzero(compared.count(live, held))
    kind, there = ELEMENT_TYPES[case.name], [case.blocks()[n] for n in changed.tolist()]
    lengths, key = np.array([len(old) for old, _ in there], np.int64), np.arange(7, 7 + len(there), dtype=np.uint64)
    start = np.arange(len(there), dtype=np.int64) * BLOCK
    steps = Steps(compared.entries(changed), Blocks(key, start, lengths, kind.exponent is not None), TABLE)
    sums = []
    for k, (old, new) in enumerate(there):
        at, before, after = entries(old, new)
        ends = [fingerprint.at(at + start[k], side, int(key[k]), TABLE) for side in (after, before)]
        sums.append((ends[0] - ends[1]) % 2**64)
    assert steps.fingerprints().tolist() == sums
    for which in (np.ones(len(there), bool), np.arange(len(there)) % 2 == 1):
        coded = steps.encode(which)
        sizes = coded.sizes.reshape(-1)
        left = np.zeros(coded.sizes.shape, bool)
        left[:, 0] = codec.gaps_stay(steps.listed.counts[which], lengths[which])
        packed = Packer().pack_all(coded.streams, np.cumsum(sizes) - sizes, sizes, left.reshape(-1), 2)
        found = Stored(packed)
        for row, k in enumerate(np.flatnonzero(which).tolist()):
            old, new = there[k]
            expected = codec._steps(kind, Entries(0, len(old), *entries(old, new)), Packer())
            assert coded.two_bytes[row] == (expected.method == STEPS16) and coded.sizes[row, 0] == expected.gaps
            assert [found[row * STREAMS + i] for i in range(STREAMS)] == list(expected.streams)


class Stored:
    """Pieces of memory by number."""

    def __init__(self, packed):
        self.all = np.empty(int(packed.sizes.sum()), np.uint8)
        native.collect(packed.addresses, packed.sizes.astype(np.uint64), self.all)
        self.ends = np.append(0, np.cumsum(packed.sizes))

    def __getitem__(self, number):
        return self.all[self.ends[number] : self.ends[number + 1]].tobytes()


def test_what_is_written_is_decoded():
    """A part of two tensors, through the receiver's decoder."""
    spec = ModelSpec((TensorSpec("a", (BLOCK + 5000,), "bfloat16"), TensorSpec("b", (3000,), "bfloat16")))
    old, new = sparse("bfloat16", BLOCK + 8000, 0.012, seed=11)
    case = Case("bfloat16", old, new, [(0, 0, 0, BLOCK), (BLOCK, 1, 0, 5000), (BLOCK + 5000, 2, 0, 3000)])
    compared, live, held = case.diff()
    counts = compared.count(live, held)
    lengths = np.array([BLOCK, 5000, 3000], np.int64)
    blocks = Blocks(np.zeros(3, np.uint64), np.array([0, BLOCK, 0]), lengths, True)
    coded = Steps(compared.entries(np.arange(3)), blocks, TABLE).encode(np.ones(3, bool))
    streams = wire.Streams(np.array([0, 0, 1]), np.array([0, 1, 0]), counts, lengths, coded.streams, coded.sizes, coded.two_bytes)
    packed = streams.pack(threads=2)
    payload = wire.lay_out(spec, range(2), [packed]).join()
    olds = [old[: BLOCK + 5000], old[BLOCK + 5000 :]]
    after = [side.copy() for side in olds]
    for change in wire.decode_part(spec, range(2), payload, olds.__getitem__):
        after[change.tensor][change.positions] = change.new
    assert np.concatenate(after).tolist() == new.tolist()


def test_memories_may_move():
    """Between publications: the addresses are read anew."""
    case = CASES["several blocks"]
    compared, live, held = case.diff()
    first = compared.count(live, held).tolist()
    moved = [torch.cat([torch.zeros(1, dtype=side[0].dtype, device=DEVICE), side[0]])[1:] for side in (live, held)]
    assert compared.count(moved[:1], moved[1:]).tolist() == first
    assert compared.entries(np.array([1])).positions.tolist() == entries(*case.blocks()[1])[0].tolist()
    assert compared.count(held, held).tolist() == [0] * compared.blocks


@pytest.mark.e2e
@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="this is the interpreted run, or the GPU's")
def test_triton_programs_interpreted():
    """This file again, with Triton's interpreter instead of compiled C."""
    pytest.importorskip("triton", reason="no triton beside this torch")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
