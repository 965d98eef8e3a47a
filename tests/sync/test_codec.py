from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync import native
from slime.sync.codec import DENSE, EXPONENT, STEPS8, STEPS16, STREAMS, Coded, Entries, PackedSteps, Packer, decode_block, encode_block
from slime.sync.native import NativeError
from slime.sync.records import BLOCK, ELEMENT_TYPES, ElementType

PACKER = Packer()
BF16 = ELEMENT_TYPES["bfloat16"]
DENSITIES = (0, 1e-9, 0.001, 0.01, 0.1, 0.34, 1)  # 1e-9: one element
FIRST = 3 * BLOCK


def random_bits(kind: ElementType, n: int, seed: int = 0) -> np.ndarray:
    """Everything that bits can say: NaN with payloads, infinities and subnormals too."""
    return np.random.default_rng(seed).integers(0, 256, n * kind.width, dtype=np.uint8).view(kind.bits)


def weights(n: int, seed: int = 0) -> np.ndarray:
    """bf16 of N(0, 0.02)."""
    values = np.random.default_rng(seed).standard_normal(n, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def changed(old: np.ndarray, density: float, far: bool = False, seed: int = 1) -> np.ndarray:
    """Steps of one unit mostly; `far`: to any other bits."""
    random = np.random.default_rng(seed)
    those = random.random(len(old)) < density
    if density and len(old):
        those[random.integers(len(old))] = True
    new, n = old.copy(), int(those.sum())
    one, high = old.dtype.type(1), 8 * old.itemsize
    step = random.integers(1, 1 << min(high, 62), n).astype(old.dtype) if far else random.choice([1, 1, 1, 2], n).astype(old.dtype)
    new[those] ^= np.maximum(step, one)
    return new


def entries_of(old: np.ndarray, new: np.ndarray, complete: bool = False) -> Entries:
    positions = np.arange(len(old)) if complete else np.flatnonzero(old != new)
    return Entries(FIRST, len(old), positions + FIRST, old[positions], new[positions])


def packed(kind: ElementType, coded: Coded, streams: Sequence[memoryview], length: int) -> PackedSteps:
    sizes = np.array([list(map(len, streams))])
    payload = np.frombuffer(b"".join(streams), np.uint8)
    numbers = ([number] for number in (coded.changed, coded.gaps, kind.width, FIRST, length))
    return PackedSteps(payload, np.cumsum(sizes)[None] - sizes, sizes, np.array([coded.method == STEPS16]), *map(np.array, numbers))


def restored(kind: ElementType, coded: Coded, old: np.ndarray) -> np.ndarray:
    n = coded.changed
    out = Entries(FIRST, len(old), np.full(n, -1), np.zeros(n, kind.bits), np.zeros(n, kind.bits))
    streams = (*map(memoryview, coded.streams), *[memoryview(b"")] * (STREAMS - len(coded.streams)))
    if coded.method in (STEPS8, STEPS16):
        steps = packed(kind, coded, streams, len(old)).unpack(PACKER)
        native.steps_decode(kind.exponent is not None, steps.blocks, old, FIRST, out.positions, out.old, out.new)
    else:
        decode_block(kind, coded.method, streams, old, out, PACKER)
    assert (np.diff(out.positions) > 0).all()
    assert np.array_equal(out.old, old[out.positions - FIRST])
    bits = old.copy()
    bits[out.positions - FIRST] = out.new
    return bits


def check(kind: ElementType, old: np.ndarray, new: np.ndarray, codec: str, complete: bool = False) -> Coded | None:
    """What the block became, having seen that it becomes the block again."""
    untouched = old.copy()
    old.flags.writeable = False
    coded = encode_block(kind, entries_of(old, new, complete), codec, old, PACKER)
    if coded is None:
        assert np.array_equal(old, new)
    else:
        assert np.array_equal(restored(kind, coded, old), new)
    assert np.array_equal(old, untouched)
    return coded


@pytest.mark.thorough
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", ELEMENT_TYPES)
def test_every_dtype_at_every_density(name: str, density: float) -> None:
    kind = ELEMENT_TYPES[name]
    for n in (1, 2, 7, 8, 9, 255, 4099, 40_000):
        old = random_bits(kind, n, seed=n)
        for far in (False, True):
            new = changed(old, density, far)
            for codec in ("steps", "exponent"):
                for complete in (False, True):
                    coded = check(kind, old.copy(), new, codec, complete)
                    assert (coded is None) == (density == 0)
            assert check(kind, old.copy(), new, "dense", complete=True).method == DENSE  # type: ignore[union-attr]


SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF, 0xFF80, 0xFFFF, 0xFFC1, 0x3F80]


@pytest.mark.parametrize("codec", ["steps", "exponent"])
def test_special_values_to_special_values(codec: str) -> None:
    """NaN payloads, -0.0, infinities, subnormals: each to each."""
    old, new = (x.reshape(-1).astype(np.uint16) for x in np.meshgrid(SPECIAL, SPECIAL))
    assert check(BF16, old.copy(), new, codec) is not None
    many = weights(BLOCK)
    many[: len(old)] = old
    after = step(many, 2e-7)
    after[: len(old)] = new
    assert check(BF16, many, after, codec).method == (EXPONENT if codec == "exponent" else STEPS8)  # type: ignore[union-attr]


def step(old: np.ndarray, rate: float, seed: int = 2) -> np.ndarray:
    """What a step of an optimizer does: a change in value against the exponent's cell, so that small weights change more often."""
    random = np.random.default_rng(seed)
    values = (old.astype(np.uint32) << 16).view(np.float32)
    cell = np.exp2(np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - 7)
    moved = random.random(len(old)) < np.minimum(1, rate / cell)
    return np.where(moved, old + random.choice(np.array([1, -1], np.int32), len(old)), old).astype(np.uint16)


@pytest.mark.parametrize("rate", [3e-8, 2e-7, 2e-6, 1e-5])
def test_exponent_is_smaller_where_exponents_tell(rate: float) -> None:
    old = weights(BLOCK)
    new = step(old, rate)
    small, usual = check(BF16, old.copy(), new, "exponent"), check(BF16, old.copy(), new, "steps")
    assert small is not None and usual is not None
    assert small.method == EXPONENT and small.nbytes < 0.8 * usual.nbytes


def test_a_few_outliers_do_not_set_the_scale_of_exponents() -> None:
    old = weights(BLOCK)
    new = step(old, 2e-7)
    plain = check(BF16, old.copy(), new, "exponent")
    old[:100] = new[:100] = 0x7FC1
    with_nan = check(BF16, old.copy(), new, "exponent")
    assert plain is not None and with_nan is not None and with_nan.nbytes < 1.01 * plain.nbytes


def test_gaps_are_of_16_bits_below_a_density() -> None:
    old = weights(BLOCK)
    methods = {}
    for density in (0.001, 0.0025, 0.0035, 0.01):
        coded = check(BF16, old.copy(), changed(old, density), "steps")
        assert coded is not None
        methods[density] = coded.method
    assert methods == {0.001: STEPS16, 0.0025: STEPS16, 0.0035: STEPS8, 0.01: STEPS8}


@pytest.mark.thorough
@pytest.mark.parametrize("gap", [254, 255, 256, 510, 765, 65534, 65535, 65536, 131070, 200_000, BLOCK - 2])
@pytest.mark.parametrize("codec", ["steps", "exponent"])
def test_gaps_around_the_escapes(gap: int, codec: str) -> None:
    old = weights(BLOCK)
    new = old.copy()
    new[[0, gap + 1]] ^= 1
    assert check(BF16, old.copy(), new, codec).method == STEPS16  # type: ignore[union-attr]
    new[-BLOCK // 64 :] ^= 1  # so many that gaps are bytes
    check(BF16, old, new, codec)


def test_entries_that_did_not_change_are_left_out() -> None:
    old = weights(1000)
    new = changed(old, 0.01)
    assert encode_block(BF16, entries_of(old, new, complete=True), "steps", None, PACKER) == encode_block(
        BF16, entries_of(old, new), "steps", None, PACKER
    )


def test_a_complete_block_is_dense_where_that_is_smaller() -> None:
    old = random_bits(ELEMENT_TYPES["float32"], 10_000)
    new = np.full_like(old, 0x3F800000)
    assert check(ELEMENT_TYPES["float32"], old.copy(), new, "steps", complete=True).method == DENSE  # type: ignore[union-attr]
    few = changed(old, 0.34)
    assert check(ELEMENT_TYPES["float32"], old.copy(), few, "steps", complete=True).method == STEPS8  # type: ignore[union-attr]


def test_dense_needs_all_elements_and_no_old_ones() -> None:
    old, new = weights(1000), weights(1000, seed=9)
    coded = encode_block(BF16, entries_of(old, new, complete=True), "dense", None, PACKER)
    assert coded is not None and np.array_equal(restored(BF16, coded, np.zeros_like(old)), new)
    with pytest.raises(ValueError, match="999 of 1000 elements are listed"):
        entries = entries_of(old, new, complete=True)
        encode_block(BF16, Entries(FIRST, 1000, entries.positions[1:], entries.old[1:], entries.new[1:]), "dense", None, PACKER)


def test_exponent_refuses_another_old() -> None:
    old, new = weights(1000), weights(1000, seed=9)
    with pytest.raises(ValueError, match="are not those of the tensor"):
        encode_block(BF16, entries_of(old, new), "exponent", new, PACKER)


@pytest.mark.thorough
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_pair_of_arrays(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(ELEMENT_TYPES.values())))
    n = data.draw(st.integers(1, 40))
    element = st.integers(0, (1 << 8 * kind.width) - 1)
    old = np.array(data.draw(st.lists(element, min_size=n, max_size=n)), kind.bits)
    new = old.copy()
    for i, value in data.draw(st.dictionaries(st.integers(0, n - 1), element)).items():
        new[i] = value
    for codec in ("steps", "exponent"):
        check(kind, old.copy(), new, codec, data.draw(st.booleans()))


def test_streams_of_another_length_are_refused() -> None:
    raw = np.zeros(1000, np.uint8)
    packed = PACKER.pack(raw)
    assert len(packed) < 30 and np.array_equal(PACKER.unpack(memoryview(packed), 1000), raw)
    for bad, size in ((packed, 999), (packed, 1001), (packed, 1 << 40), (packed + b"x", 1000), (packed[:-1], 1000), (bytes(1001), 1000)):
        with pytest.raises(NativeError):
            PACKER.unpack(memoryview(bad), size)


@pytest.mark.parametrize("apart", [48, 64, 83, 127, 128, 200])
def test_gaps_that_zstd_hardly_shortens_stay_raw(apart):
    """From 64 to 127 elements for each changed one; where they lie evenly the block is at most a twelfth longer for it."""
    old, n = weights(BLOCK), BLOCK // apart
    positions = np.sort(np.random.default_rng(2).choice(BLOCK, n, replace=False))
    entries = Entries(FIRST, BLOCK, positions + FIRST, old[positions], old[positions] ^ np.uint16(1))
    coded = encode_block(BF16, entries, "steps", None, PACKER)
    raw = len(coded.streams[0]) == coded.gaps
    assert raw == (64 <= BLOCK / n < 128)
    if raw:
        packed = len(PACKER.pack(np.frombuffer(coded.streams[0], np.uint8)))
        assert coded.nbytes <= 13 / 12 * (coded.nbytes - coded.gaps + packed)
