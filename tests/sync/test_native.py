from contextlib import suppress

import numpy as np
import pytest

from slime.layout import Block
from slime.sync import native
from slime.sync.native import RUN, SEGMENT, NativeError

WIDTHS = (1, 2, 4, 8)
LEVELS = (0, 1, 2)  # of the instructions that a loop may use; 0 is what the CPU has


def random_bits(width: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n * width, dtype=np.uint8).view(f"<u{width}")


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("width", WIDTHS)
def test_diff_finds_every_changed_element(width: int, level: int) -> None:
    """All lengths around the vectors' widths, from addresses that are not aligned."""
    for n in (0, 1, 7, 31, 32, 33, 64, 65, 257, 300_000):
        memory = np.zeros(n * width + 3, np.uint8)
        old = memory[3:].view(f"<u{width}")
        old[:] = random_bits(width, n)
        changed = np.random.default_rng(n).random(n) < 0.05
        changed[:1] = changed[n - 1 :] = True
        new = np.where(changed, old ^ old.dtype.type(1 << (8 * width - 1)), old)
        assert np.array_equal(native.diff(old, new, base=1 << 33, level=level), np.flatnonzero(changed) + (1 << 33))
        assert len(native.diff(old, old.copy(), level=level)) == 0


def test_diff_is_of_bits() -> None:
    old = np.array([0.0, np.nan, 1.0], np.float32).view(np.uint32)
    new = np.array([-0.0, np.nan, 1.0], np.float32).view(np.uint32)
    assert native.diff(old, new).tolist() == [0]


@pytest.mark.parametrize("width", WIDTHS)
def test_planes(width: int) -> None:
    bits = random_bits(width, 1001)
    planes = native.split(bits)
    assert np.array_equal(planes.reshape(width, -1), bits.view(np.uint8).reshape(-1, width).T)
    merged = np.zeros_like(bits)
    native.merge(planes, merged)
    assert np.array_equal(merged, bits)


GAPS = [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65534, 65535, 65536, 131069, 131070, 131071, 0, 0]


def decode(is_float: bool, streams: tuple[np.ndarray, ...], block: np.ndarray, first: int, *found: np.ndarray) -> None:
    """One block, whose old bits begin at position `first`."""
    gaps, low, _, _, large, raw = streams
    counts = (len(gaps), len(large), len(raw) // block.itemsize)
    addresses = [stream.ctypes.data if stream is not low or len(low) else 0 for stream in streams]
    row = np.array([(first, len(block), len(found[0]), *addresses, *counts)], native.STEPS_BLOCK)
    native.steps_decode(is_float, row, block, first, *found)


@pytest.mark.parametrize("gap_width", [1, 2])
def test_gaps_with_escapes(gap_width: int) -> None:
    positions = np.cumsum(np.array(GAPS) + 1) - 1 + 5
    length = int(positions[-1]) - 5 + 1
    old = np.zeros(len(GAPS), np.uint16)
    gaps, low, signs, flags, large, raw = native.steps_encode(True, gap_width, positions, old, old + 1, 5, length)
    assert len(gaps) == sum(gap // (255 if gap_width == 1 else 65535) + 1 for gap in GAPS)
    found = (np.zeros(len(GAPS), np.int64), np.zeros_like(old), np.zeros_like(old))
    streams = (gaps, low, signs, flags, large, raw.view(np.uint8))
    decode(True, streams, np.zeros(length, np.uint16), 5, *found)
    assert np.array_equal(found[0], positions) and np.array_equal(found[2], old + 1)
    with pytest.raises(NativeError, match="positions"):  # a block that ends one element earlier
        decode(True, streams, np.zeros(length - 1, np.uint16), 5, *found)
    for cut in (gaps[:-1], np.append(gaps, np.uint8(0)), np.append(gaps, np.uint8(255))):
        below = low if gap_width == 1 else np.resize(low, len(cut))
        with pytest.raises(NativeError):
            decode(True, (cut, below, signs, flags, large, raw.view(np.uint8)), np.zeros(length, np.uint16), 5, *found)


def test_steps_are_units_in_the_last_place() -> None:
    """Across zero, -0.0 counts as a value of its own; an integer's step is its difference."""
    old = np.array([0x0000, 0x8000, 0x3F80, 0xBF80, 0x0001, 0x7F80], np.uint16)
    new = np.array([0x8000, 0x0000, 0x3F81, 0xBF81, 0x8001, 0x7F81], np.uint16)
    _, _, signs, flags, large, raw = native.steps_encode(True, 1, np.arange(6), old, new, 0, 6)
    assert np.unpackbits(signs, bitorder="little").tolist()[:6] == [1, 0, 0, 1, 1, 0]
    assert np.unpackbits(flags, bitorder="little").tolist()[:6] == [0, 0, 0, 0, 1, 0]
    assert large.tolist() == [1] and len(raw) == 0  # 1 to 0.0, 2 to -0.0, 3 to -1
    _, _, signs, flags, large, raw = native.steps_encode(False, 1, np.arange(2), old[:2], np.array([257, 0x8000 - 256], np.uint16), 0, 2)
    assert signs.tolist() == [2] and flags.tolist() == [3] and large.tolist() == [255, 254] and raw.tolist() == [257]


@pytest.mark.parametrize("is_float", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_steps_of_every_size(width: int, is_float: bool) -> None:
    """Through the chunks of 64 and their last ones: what is flagged, what is raw, and streams that end too early or too late."""
    random = np.random.default_rng(width)
    for n in (1, 63, 64, 65, 200, 1000):
        block = random_bits(width, 3 * n, seed=n)
        positions = np.sort(random.choice(3 * n, n, replace=False))
        old = block[positions]
        for most in (1, 2, 300, 1 << 20):
            steps = np.maximum(random.integers(0, most + 1, n), 1).astype(old.dtype)
            steps[steps == 0] = 1  # 2^20 is none of a narrow element
            new = old + np.where(random.random(n) < 0.5, steps, -steps).astype(old.dtype)
            coded = native.steps_encode(is_float, 1, positions + 5, old, new, 5, 3 * n)
            gaps, low, signs, flags, large, raw = coded[0], coded[1], *coded[2:5], coded[5].view(np.uint8)
            found = (np.zeros(n, np.int64), np.zeros_like(old), np.zeros_like(old))
            decode(is_float, (gaps, low, signs, flags, large, raw), block, 5, *found)
            assert np.array_equal(found[0], positions + 5) and np.array_equal(found[1], old) and np.array_equal(found[2], new)
            wrong = [(np.append(large, np.uint8(0)), raw), (large, np.append(raw, np.zeros(width, np.uint8)))]
            wrong += [(large[:-1], raw)] if len(large) else []
            wrong += [(large, raw[:-width])] if len(raw) else []
            for other in wrong:
                with pytest.raises(NativeError, match="values"):
                    decode(is_float, (gaps, low, signs, flags, *other), block, 5, *found)


@pytest.mark.parametrize("exponent", [(7, 8), (10, 5), (0, 0)])
def test_every_processor_codes_alike(exponent: tuple[int, int]) -> None:
    block = (np.random.default_rng(0).standard_normal(10_007, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    positions = np.flatnonzero(np.random.default_rng(1).random(len(block)) < 0.1)
    new = block[positions] + np.uint16(1)
    coded = [native.exponent_encode(exponent, block, positions + 9, new, 9, level) for level in (0, 1, 2)]
    assert all(np.array_equal(coded[0][i], of[i]) for of in coded[1:] for i in (0, 1))
    for level in (0, 1, 2):
        found = (np.zeros(len(new), np.int64), np.zeros_like(new), np.zeros_like(new))
        native.exponent_decode(exponent, coded[0], block, 9, *found, level)
        assert np.array_equal(found[0], positions + 9) and np.array_equal(found[1], block[positions]) and np.array_equal(found[2], new)


@pytest.mark.parametrize(
    ("positions", "why"), [([3, 3], "positions"), ([4, 3], "positions"), ([2, 3], "positions"), ([4, 13], "positions"), ([4, 5], "values")]
)
def test_encoders_refuse_what_no_block_has(positions: list[int], why: str) -> None:
    where, block, new = np.array(positions), np.zeros(10, np.uint16), np.array([1, 0 if why == "values" else 1], np.uint16)
    with pytest.raises(NativeError, match=why):
        native.steps_encode(True, 1, where, block[:2], new, 3, 10)
    with pytest.raises(NativeError, match=why):
        native.exponent_encode((7, 8), block, where, new, 3)


@pytest.mark.thorough
@pytest.mark.parametrize("width", WIDTHS)
def test_fingerprint_at_positions_in_a_row_or_not(width: int) -> None:
    """Whole rows of 1024 words are hashed as they lie, where their positions are those of a row, and only there."""
    factors, bits = native.table(1), random_bits(width, 5000)
    rows = np.r_[100:4000, 7000:8100]
    swapped, doubled, jumbled = rows.copy(), rows.copy(), np.random.default_rng(0).permutation(rows)
    swapped[[2000, 2001]], doubled[2000] = swapped[[2001, 2000]], doubled[2001]
    for positions in (rows, rows[::2].copy(), swapped, doubled, jumbled):
        each = bits[: len(positions)]
        alone = [native.fingerprint_at(positions[i : i + 1], each[i : i + 1], 7, factors) for i in range(len(positions))]
        assert {native.fingerprint_at(positions, each, 7, factors, level) for level in LEVELS} == {sum(alone) % 2**64}
    size = min(width, 2)
    alone = [native.fingerprint(bits[i : i + 1], (100 + i) * (width // size), size, 7, factors) for i in range(3900)]
    assert {native.fingerprint_at(rows[:3900], bits[:3900], 7, factors, level) for level in LEVELS} == {sum(alone) % 2**64}


def blocks(random: np.random.Generator) -> tuple[Block, Block]:
    """Two of one shape, of up to 4 dimensions, with and without room between their stretches."""
    shape, strides = tuple(random.integers(1, 7, random.integers(0, 5)).tolist()), []
    for _ in range(2):
        found, reach = [], 0
        for length in reversed(shape):
            stride = reach + 1 + int(random.integers(0, 3))
            found.append(stride)
            reach += (length - 1) * stride
        strides.append(tuple(reversed(found)))
    source, target = (Block(int(random.integers(0, 50)), shape, each) for each in strides)
    return source, target


@pytest.mark.thorough
@pytest.mark.parametrize("width", WIDTHS)
def test_project_is_find_and_at(width: int) -> None:
    random = np.random.default_rng(width)
    for _ in range(300):
        source, target = blocks(random)
        positions = np.flatnonzero(random.random(random.integers(1, 2000)) < random.choice([0.02, 0.5, 1]))
        old, new = (random_bits(width, len(positions), seed) for seed in (1, 2))
        inside, index = source.find(positions)
        there, before, after = native.project(positions, old, new, source, target)
        assert np.array_equal(there, target.at(index[inside]))
        assert np.array_equal(before, old[inside]) and np.array_equal(after, new[inside])


def test_project_stays_within_its_room() -> None:
    """More positions in a block than it has elements: some come twice."""
    block, bits = Block(0, (2, 3), (5, 1)), np.zeros(20, np.uint16)
    with pytest.raises(NativeError, match="room"):
        native.project(np.repeat(np.arange(10), 2), bits, bits, block, block)
    deep = Block(0, (1,) * 9, tuple(range(9, 0, -1)))
    with pytest.raises(NativeError, match="arguments"):
        native.project(np.arange(20), bits, bits, deep, deep)
    random = np.random.default_rng(0)
    for _ in range(100):  # in no order at all it ends as well
        positions = random.integers(-9, 9, 20)
        assert len(native.runs(positions, 3)) <= 6
        with suppress(NativeError):
            native.project(positions, bits, bits, block, block)


@pytest.mark.parametrize("least", [2, 3, 64])
def test_runs_are_the_long_stretches(least: int) -> None:
    random = np.random.default_rng(least)
    for _ in range(300):
        listed = random.random(random.integers(1, 1000)) < random.choice([0.1, 0.9, 0.99, 1])
        positions = np.flatnonzero(listed) + 7
        edges = np.flatnonzero(np.diff(np.r_[0, listed.astype(np.int8), 0]))
        before = np.r_[0, np.cumsum(listed)]  # entries below each position
        expected = [[before[a], before[b]] for a, b in edges.reshape(-1, 2).tolist() if b - a >= least]
        assert native.runs(positions, least).tolist() == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_scatter_and_gather(width: int) -> None:
    live, before = random_bits(width, 1000), random_bits(width, 1000)
    bits = random_bits(width, 40, seed=1)
    index = np.array([999, 0, 5, 7, 100, 50], np.int32)
    rows = [
        (live.ctypes.data, 0, 4, 0, width, 0),
        (live.ctypes.data + 200 * width, 4, 34, 0, width, 1),
        (live.ctypes.data, 38, 2, 4, width, 0),
    ]
    segments = np.array(rows, SEGMENT)
    native.scatter(segments, index, bits)
    expected = before.copy()
    expected[index[:4]], expected[200:234], expected[index[4:]] = bits[:4], bits[4:38], bits[38:]
    assert np.array_equal(live, expected)
    read = np.zeros_like(bits)
    native.gather(segments, index, read)
    assert np.array_equal(read, bits)


@pytest.mark.parametrize(
    "row", [(0, 39, 2, 0, 2, 0), (0, 1 << 63, 1 << 63, 0, 2, 1), (0, 0, 3, 4, 2, 0), (0, 0, 1, 0, 4, 0), (0, 0, 1, 9, 2, 0)]
)
def test_scatter_refuses_entries_that_there_are_not(row: tuple[int, ...]) -> None:
    """Address 0 would end the process if it were written."""
    with pytest.raises(NativeError, match="arguments"):
        native.scatter(np.array([row], SEGMENT), np.zeros(6, np.int32), np.zeros(40, np.uint16))


def test_over_runs_refuses_bad_rows() -> None:
    for out, size in ((3, 2), (0, 4), (0, 0)):
        with pytest.raises(NativeError):
            native.over_runs(np.array([(0, 0, 8, 0, out, size)], RUN), native.table(0), 3)


def test_library_that_was_not_built(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = native.library.__wrapped__
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.raises(ImportError, match=r"older or newer than native\.py: run `pip install"):
        load()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(ImportError, match=r"has no _native\*.so.*run `pip install"):
        load()
    (tmp_path / "_native.so").write_text("of another machine")
    with pytest.raises(ImportError, match="cannot be loaded"):
        load()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_fingerprint_grows_by_is_the_difference_of_two(width: int) -> None:
    factors = native.table(11)
    old, new = random_bits(width, 5000), random_bits(width, 5000, seed=1)
    for positions in (np.arange(5000) + 333, np.sort(np.random.default_rng(2).choice(1 << 20, 5000, replace=False))):
        before, after = (native.fingerprint_at(positions, bits, 7, factors) for bits in (old, new))
        assert before != after
        grown = {native.fingerprint_moved(positions, old, new, 7, factors, level) for level in LEVELS}
        assert grown == {(after - before) % 2**64}


def test_bits_and_bytes_are_counted() -> None:
    some = np.array([0, 255, 254, 1, 255, 255, 128], np.uint8)
    addresses, sizes = some.ctypes.data + np.array([0, 1, 3, 6], np.uint64), np.array([7, 3, 0, 1], np.uint64)
    assert native.ones(addresses, sizes).tolist() == [33, 16, 0, 1]
    assert native.full_bytes(addresses, sizes).tolist() == [3, 1, 0, 0]
