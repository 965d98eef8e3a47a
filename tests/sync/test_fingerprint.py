import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.sync import fingerprint, native
from slime.sync.fingerprint import RUN

MASK = (1 << 64) - 1
GOLD = 0x9E3779B97F4A7C15
KEY = fingerprint.run_key("a run")
TABLE = fingerprint.table(KEY)
TENSOR = fingerprint.tensor_key(KEY, "model.embed_tokens.weight")


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def defined(bits: np.ndarray, key: int, start: int = 0) -> int:
    """The definition, in Python's integers."""
    words = bits.view(np.uint8 if bits.itemsize == 1 else np.uint16).tolist()
    start *= max(bits.itemsize // 2, 1)
    table = [mix((KEY + (j + 1) * GOLD) & MASK) | 1 for j in range(1024)]
    return sum((mix((key + ((i >> 10) + 1) * GOLD) & MASK) | 1) * table[i & 1023] * word for i, word in enumerate(words, start)) & MASK


def random_bits(width: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n * width, dtype=np.uint8).view(f"<u{width}")


def test_keys_are_as_written() -> None:
    assert int.from_bytes(hashlib.blake2b(b"a run", digest_size=8).digest(), "little") == KEY
    keyed = hashlib.blake2b(b"model.embed_tokens.weight", digest_size=8, key=KEY.to_bytes(8, "little"))
    assert int.from_bytes(keyed.digest(), "little") == TENSOR
    assert fingerprint.tensor_key(fingerprint.run_key("another"), "model.embed_tokens.weight") != TENSOR


def test_known_value() -> None:
    """Both sides must compute this in every version of slime."""
    assert fingerprint.full(np.arange(3000, dtype=np.uint16), TENSOR, TABLE) == 10840037760256552296


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_full_is_the_definition(width: int, level: int) -> None:
    bits = random_bits(width, 2500)
    assert fingerprint.full(bits, TENSOR, TABLE) == defined(bits, TENSOR)
    size = min(width, 2)
    assert native.fingerprint(bits, 0, size, TENSOR, TABLE, level) == defined(bits, TENSOR)
    top = np.full(2500, (1 << 8 * width) - 1, bits.dtype)
    assert native.fingerprint(top, 0, size, TENSOR, TABLE, level) == defined(top, TENSOR)


@given(cuts=st.lists(st.integers(0, 5000), max_size=6), width=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_any_division_gives_the_same_sum(cuts: list[int], width: int) -> None:
    bits, edges = random_bits(width, 5000), [0, *sorted(cuts), 5000]
    parts = [fingerprint.full(bits[a:b], TENSOR, TABLE, a) for a, b in pairwise(edges)]
    assert sum(parts) & MASK == fingerprint.full(bits, TENSOR, TABLE)


@given(seed=st.integers(0, 1 << 32), width=st.sampled_from([1, 2, 4, 8]), n=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_changes_cost_their_own_words(seed: int, width: int, n: int) -> None:
    random = np.random.default_rng(seed)
    old = random_bits(width, 5000, seed)
    positions = np.sort(random.choice(5000, n, replace=False)).astype(np.int64)
    new = old.copy()
    new[positions] = random_bits(width, n, seed + 1)
    change = fingerprint.at(positions, new[positions], TENSOR, TABLE) - fingerprint.at(positions, old[positions], TENSOR, TABLE)
    assert (fingerprint.full(old, TENSOR, TABLE) + change) & MASK == fingerprint.full(new, TENSOR, TABLE)


def test_far_positions() -> None:
    """Beyond 2^32 elements of 8 bytes, where words are beyond 2^34."""
    bits = random_bits(8, 100)
    start = (1 << 33) + 1000
    positions = np.arange(start, start + 100)
    assert fingerprint.at(positions, bits, TENSOR, TABLE) == defined(bits, TENSOR, start) == fingerprint.full(bits, TENSOR, TABLE, start)


def test_any_single_word_shows() -> None:
    """All differences of a word, at positions on both sides of the tables' edges."""
    differences = np.arange(1, 1 << 16, dtype=np.uint16)
    for position in (0, 1, 1022, 1023, 1024, 1025, 1 << 20, (1 << 40) + 7):
        at = native.fingerprint(np.ones(1, np.uint16), position, 2, TENSOR, TABLE)
        products = differences.astype(np.uint64) * np.uint64(at)  # F is linear in a word
        assert products.all()
        one = fingerprint.at(np.full(1, position), differences[-1:], TENSOR, TABLE)
        assert one == int(products[-1])


def swap_rows(bits: np.ndarray) -> None:
    bits[:1024], bits[1024:2048] = bits[1024:2048].copy(), bits[:1024].copy()


def swap_neighbours(bits: np.ndarray) -> None:
    bits[7], bits[8] = bits[8], bits[7]


def flip_two_signs(bits: np.ndarray) -> None:
    bits[[100, 3333]] ^= 0x8000


def flip_signs_at_the_corners_of_a_rectangle(bits: np.ndarray) -> None:
    """The factors are U1 V1 + U1 V2 + U2 V1 + U2 V2 = (U1 + U2) (V1 + V2), up to the signs: the fewest bits that any change leaves."""
    bits[[5, 700, 1024 + 5, 1024 + 700]] ^= 0x8000


def flip_all_signs(bits: np.ndarray) -> None:
    bits ^= 0x8000


def one_up_one_down(bits: np.ndarray) -> None:
    bits[5] += 1
    bits[1029] -= 1


def shift_by_one(bits: np.ndarray) -> None:
    bits[:] = np.roll(bits, 1)


@pytest.mark.parametrize(
    "change",
    [
        swap_rows,
        swap_neighbours,
        flip_two_signs,
        flip_signs_at_the_corners_of_a_rectangle,
        flip_all_signs,
        one_up_one_down,
        shift_by_one,
    ],
)
def test_changes_with_a_structure_show(change) -> None:
    """Under a hundred runs' keys: none hides, and the differences are not related."""
    found = set()
    for run in range(100):
        key = fingerprint.run_key(f"run {run}")
        table, tensor = fingerprint.table(key), fingerprint.tensor_key(key, "w")
        bits = random_bits(2, 4096, seed=run)
        before = fingerprint.full(bits, tensor, table)
        change(bits)
        found.add(fingerprint.full(bits, tensor, table) - before & MASK)
    assert 0 not in found and len(found) == 100


def test_differences_of_random_changes_spread_evenly() -> None:
    """The top byte of a difference stands for a hash of 8 bits: two to five changed words hide from it once in 256 times, as from a random
    function's. 20,000 trials; the bounds are 5 sigma."""
    random, trials = np.random.default_rng(3), 20_000
    tops = np.zeros(256, int)
    for _ in range(trials):
        n = int(random.integers(2, 6))
        positions = random.integers(0, 1 << 24, n)
        old, new = random.integers(0, 1 << 16, (2, n), dtype=np.uint16)
        change = fingerprint.at(positions, new, TENSOR, TABLE) - fingerprint.at(positions, old, TENSOR, TABLE)
        tops[(change & MASK) >> 56] += 1
    mean = trials / 256
    assert abs(tops[0] - mean) < 5 * mean**0.5
    assert ((tops - mean) ** 2 / mean).sum() < 255 + 5 * (2 * 255) ** 0.5


def test_tensors_and_runs_do_not_stand_for_one_another() -> None:
    bits = random_bits(2, 1000)
    other = fingerprint.tensor_key(KEY, "model.norm.weight")
    assert fingerprint.full(bits, TENSOR, TABLE) != fingerprint.full(bits, other, TABLE)
    assert fingerprint.full(bits, TENSOR, fingerprint.table(fingerprint.run_key("another"))) != fingerprint.full(bits, TENSOR, TABLE)


def test_over_runs_reads_live_memory() -> None:
    """Rows of a matrix divided by columns, and a tensor of bytes."""
    matrix, small = random_bits(2, 64 * 32), random_bits(1, 999)
    other = fingerprint.tensor_key(KEY, "other")
    rows = [(matrix.ctypes.data + 2 * (64 * r + c), 64 * r + c, 32, TENSOR, 0, 2) for r in range(32) for c in (0, 32)]
    rows += [(small.ctypes.data, 0, 500, other, 2, 1), (small.ctypes.data + 500, 500, 499, other, 2, 1)]
    sums = fingerprint.over_runs(np.array(rows, RUN), TABLE, 3)
    assert sums.tolist() == [fingerprint.full(matrix, TENSOR, TABLE), 0, fingerprint.full(small, other, TABLE)]
