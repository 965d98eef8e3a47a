"""Fingerprints of memory, and entries to and from addresses, against a definition written with Python's integers.

The same tests run on compiled C, on the Triton programs interpreted on the CPU (TRITON_INTERPRET=1, which a test here starts), and on a GPU
(SLIME_TEST_DEVICE=cuda).
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from slime.sync import kernels
from slime.sync.kernels import audit, scatter
from slime.sync.kernels.audit import Audit, Plan
from slime.sync.kernels.scatter import Scatter

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUN = np.dtype([("address", "<u8"), ("start", "<u8"), ("words", "<u8"), ("key", "<u8"), ("out", "<u4"), ("size", "<u4")])
GOLD, ALL = 0x9E3779B97F4A7C15, 2**64 - 1
RUN_KEY = 0xF00DFACE12345678


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & ALL
    return z ^ (z >> 31)


TABLE = np.array([mix((RUN_KEY + (j + 1) * GOLD) & ALL) | 1 for j in range(1024)], np.uint64)


def defined(words, start, key):
    """F of words [n] that begin at word `start` of a tensor."""
    total = 0
    for i, word in enumerate(words.tolist(), start):
        total += (mix((key + ((i >> 10) + 1) * GOLD) & ALL) | 1) * int(TABLE[i & 1023]) * word
    return total & ALL


@dataclass
class Part:
    """Words at an offset of a memory."""

    size: int
    offset: int  # bytes
    start: int
    words: int
    key: int = 0x1234567890ABCDEF
    out: int = 0


def memory_of(nbytes, seed=0):
    """Random bytes at a multiple of 256."""
    room = torch.randint(0, 256, (nbytes + 256,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return room[-room.data_ptr() % 256 :][:nbytes]


def runs_of(memory, parts):
    """RUN [n], and the sums that the definition gives."""
    host, outs = memory.cpu().numpy(), max(part.out for part in parts) + 1
    sums = [0] * outs
    for part in parts:
        words = host[part.offset : part.offset + part.words * part.size].view(f"<u{part.size}")
        sums[part.out] += defined(words, part.start, part.key)
    rows = [(memory.data_ptr() + p.offset, p.start, p.words, p.key, p.out, p.size) for p in parts]
    return np.array(rows, RUN), np.array([total & ALL for total in sums], np.uint64)


CASES = {
    "one aligned row": [Part(2, 0, 0, 1024)],
    "rows and an edge": [Part(2, 0, 0, 5 * 1024 + 13)],
    "begins inside a row": [Part(2, 16, 1024 + 8, 3000)],
    "begins inside a vector": [Part(2, 10, 5, 2500)],  # word 0 lies at a multiple of 16
    "across vectors": [Part(2, 2, 0, 2100)],
    "less than a vector": [Part(2, 6, 3, 4), Part(2, 32, 1023, 1), Part(2, 64, 1020, 9)],
    "far in a tensor": [Part(2, 0, (1 << 33) + 1016, 2056)],
    "bytes": [Part(1, 0, 0, 3000), Part(1, 3072, 16, 1040)],
    "bytes across vectors": [Part(1, 3, 0, 1100), Part(1, 2001, 1, 30)],
    "no words": [Part(2, 0, 7, 0), Part(2, 0, 0, 8)],
    "several outs": [
        Part(2, 0, 0, 2048, out=0),
        Part(1, 5000, 0, 64, out=3, key=7),
        Part(2, 6144, 2048, 512, out=0),
        Part(2, 9, 0, 0, out=1),
    ],
    "odd addresses and bytes": [Part(1, 1, 1, 2047, out=1), Part(2, 4096, 0, 1024, out=0, key=ALL)],
}


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
def test_fingerprint_is_the_definition(parts):
    memory = memory_of(16384)
    runs, expected = runs_of(memory, parts)
    measured = Audit(runs, TABLE, len(expected), DEVICE)
    assert measured().dtype == np.uint64 and measured().tolist() == expected.tolist()


def test_fingerprint_of_the_largest_words_wraps():
    """Each sum of 16-bit words times halves of V is as large as it can be."""
    memory = memory_of(2 * 4 * 1024)
    memory.fill_(255)
    runs, expected = runs_of(memory, [Part(2, 0, 0, 4096)])
    assert Audit(runs, TABLE, 1, DEVICE)().tolist() == expected.tolist()
    most = np.full(1024, ALL, np.uint64)
    row = sum((mix((0x1234567890ABCDEF + (h + 1) * GOLD) & ALL) | 1) * ALL * 0xFFFF * 1024 for h in range(4)) & ALL
    assert Audit(runs, most, 1, DEVICE)().tolist() == [row]


def test_fingerprint_sees_what_memory_holds_when_called():
    memory = memory_of(4096)
    runs, before = runs_of(memory, [Part(2, 0, 0, 2048)])
    measured = Audit(runs, TABLE, 1, DEVICE)
    assert measured().tolist() == before.tolist()
    memory[4095] ^= 128
    _, after = runs_of(memory, [Part(2, 0, 0, 2048)])
    assert measured().tolist() == after.tolist() != before.tolist()


def test_fingerprint_of_many_tiles_of_every_plan():
    """Sums do not depend on how the work is cut."""
    memory = memory_of(24 * 1024)
    parts = [Part(2, 16 * n, 8 * n, 1 + 911 * n, out=n % 3) for n in range(5)] + [Part(2, 0, 0, 12 * 1024, out=3)]
    runs, expected = runs_of(memory, parts)
    for plan in (Plan(), Plan(tile=8, warps=1), Plan(tile=5, warps=8)):
        assert Audit(runs, TABLE, len(expected), DEVICE, plan)().tolist() == expected.tolist()


def test_tiles_cover_every_word_once():
    """On paper: words of all tiles are those of the runs, at the addresses where they lie, and wide ones are aligned."""
    parts = [Part(2, 16, 8, 9000), Part(2, 10, 5, 2500, out=1), Part(2, 2, 0, 77, out=2), Part(2, 0, 1016, 16, out=3)]
    runs, _ = runs_of(memory_of(32768), parts)
    base, found = int(runs["address"][0]) - 16, {}
    for vector, part in zip((8, 1), audit.by_alignment(runs), strict=True):
        for address, row, first, end, key, out, *_ in audit.tiles_of(part, vector, 4).tolist():
            assert address % (2 * vector) == 0 and key == parts[0].key and 0 <= first < end <= 4 * 1024 // vector
            for word in range(first * vector, end * vector):
                assert (out, row * 1024 + word) not in found
                found[out, row * 1024 + word] = address + 2 * word - base
    assert found == {(n, p.start + k): p.offset + 2 * k for n, p in enumerate(parts) for k in range(p.words)}


SEGMENT_FIELDS = ("address", "first", "count", "at", "width", "run")


def segments_of(width, live, rows):
    """SEGMENT [n] in `live` from rows of (offset in elements, first, count, at, run)."""
    from slime.sync.staging import SEGMENT

    segments = np.zeros(len(rows), SEGMENT)
    for segment, (offset, first, count, at, run) in zip(segments, rows, strict=True):
        values = ((live.data_ptr() + offset * width) % 2**64, first, count, at, width, run)
        for field, value in zip(SEGMENT_FIELDS, values, strict=True):
            segment[field] = value
    return segments


@pytest.mark.parametrize(("dtype", "width"), scatter.WIDTHS.items(), ids=str)
def test_entries_go_to_their_places_and_come_back(dtype, width):
    rng = np.random.default_rng(width)
    live = rng.integers(0, 256, 12000 * width, np.uint8).view(f"<u{width}")
    bits = rng.integers(0, 256, 8000 * width, np.uint8).view(f"<u{width}")
    lists = [np.sort(rng.permutation(reach)[:n]) for reach, n in ((5000, 2500), (1, 1), (900, 0), (2900, 999))]
    index = np.concatenate(lists).astype("<u4")
    rows = [  # offset, first, count, at, run; bits[0] and bits[5502] belong to none
        (0, 1, 2500, 0, 0),
        (5000, 2501, 3001, 2500, 1),
        (8001, 5503, 1, 2500, 0),
        (9000, 5504, 0, 2501, 0),
        (8002, 5504, 999, 2501, 0),
        (11000, 6503, 7, 3500, 1),
    ]
    places = np.full(8000, -1)
    for offset, first, count, at, run in rows:
        places[first : first + count] = offset + (np.arange(count) if run else index[at : at + count].astype(np.int64))
    inside, expected = places >= 0, live.copy()
    expected[places[inside]] = bits[inside]

    there, staged = (torch.from_numpy(array.copy()).view(dtype).to(DEVICE) for array in (live.view(np.uint8), bits.view(np.uint8)))
    moved = Scatter(segments_of(width, there, rows), torch.from_numpy(index.view("<i4")).to(DEVICE), staged, DEVICE)
    old = moved.read()
    assert old.dtype == dtype and unsigned(old)[inside].tolist() == live[places[inside]].tolist() and not unsigned(old)[~inside].any()
    assert unsigned(there).tolist() == live.tolist()
    moved.write()
    assert unsigned(there).tolist() == expected.tolist() != live.tolist()
    assert unsigned(moved.read())[inside].tolist() == bits[inside].tolist()
    Scatter(moved.segments, moved.index, old, DEVICE).write()
    assert unsigned(there).tolist() == live.tolist()


def unsigned(tensor):
    return scatter.unsigned(tensor.cpu())


def test_indices_are_unsigned():
    """Beyond 2^31, as far as an address reaches: a segment that begins far below its memory."""
    live = memory_of(64)
    far = (1 << 32) - 64
    segments = segments_of(1, live, [(-far, 0, 64, 0, 0)])
    index = torch.arange(64, dtype=torch.int64).add(far - (1 << 32)).to(torch.int32).to(DEVICE)
    bits = torch.arange(64, dtype=torch.uint8, device=DEVICE)
    moved = Scatter(segments, index, bits, DEVICE)
    moved.write()
    assert live.tolist() == list(range(64)) == moved.read().tolist()


def test_no_entries():
    empty = torch.empty(0, dtype=torch.int16, device=DEVICE)
    moved = Scatter(segments_of(2, empty, []), torch.empty(0, dtype=torch.int32, device=DEVICE), empty, DEVICE)
    moved.write()
    assert len(moved.read()) == 0
    assert Audit(np.zeros(0, RUN), TABLE, 2, DEVICE)().tolist() == [0, 0]


@pytest.mark.parametrize("row", [(0, 0, 9, 0, 0), (0, 1, 8, 0, 1), (0, 0, 8, 1, 0)])
def test_segments_that_reach_beyond_what_is_staged_are_refused(row):
    bits, index = torch.zeros(8, dtype=torch.int16, device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError, match="beyond"):
        Scatter(segments_of(2, bits, [row]), index, bits, DEVICE)


@pytest.mark.skipif(not kernels.on_triton(torch.device(DEVICE)), reason="compiled C has no tiles")
@pytest.mark.parametrize("name", ["scatter", "gather"])
def test_a_tile_without_entries_moves_nothing(name):
    """By which the programs are compiled ahead."""
    memory = memory_of(64)
    before, tiles = memory.tolist(), torch.zeros((1, scatter.TILE), dtype=torch.int64, device=DEVICE)
    tiles[0, 0] = memory.data_ptr()
    bits = torch.ones(64, dtype=torch.uint8, device=DEVICE)
    scatter.launch(name, tiles, torch.zeros(1, dtype=torch.int32, device=DEVICE), bits)
    assert memory.tolist() == before and bits.all()


@pytest.mark.e2e
@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="this is the interpreted run, or the GPU's")
def test_triton_programs_interpreted():
    """This file again, with Triton's interpreter instead of compiled C."""
    pytest.importorskip("triton", reason="no triton beside this torch")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.e2e
@pytest.mark.skipif(INTERPRETED, reason="another process sees the same")
def test_triton_is_imported_only_where_it_runs():
    """Beside torch and numpy nothing is needed."""
    code = (
        "import sys\nfor name in ('triton', 'ray', 'hydra', 'transformers'): sys.modules[name] = None\n"
        "import slime.sync.kernels, slime.sync.kernels.audit, slime.sync.kernels.scatter"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_which_device_runs_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.on_triton(torch.device("cuda")) and not kernels.on_triton(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.on_triton(torch.device("cpu"))


def test_keys_of_the_definition_are_those_of_the_channel():
    """The table and the keys by the formula's words."""
    from slime.sync import fingerprint

    key = int.from_bytes(hashlib.blake2b(b"run", digest_size=8).digest(), "little")
    assert fingerprint.run_key("run") == key
    assert fingerprint.table(RUN_KEY).tolist() == TABLE.tolist() and fingerprint.RUN == RUN
    of = hashlib.blake2b(b"model.norm.weight", digest_size=8, key=key.to_bytes(8, "little")).digest()
    assert fingerprint.tensor_key(key, "model.norm.weight") == int.from_bytes(of, "little")
