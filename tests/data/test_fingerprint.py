from itertools import pairwise
from pathlib import Path

import pytest

from slime.data.fingerprint import BLOCK, BLOCKS, fingerprint, starts


def test_a_file_is_known_by_its_content_and_not_by_its_name(tmp_path: Path):
    for name, content in (("a", b"x" * 100), ("b", b"x" * 100), ("c", b"x" * 99 + b"y"), ("d", b"x" * 101), ("e", b"")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d, e = (fingerprint(tmp_path / name) for name in "abcde")
    assert a == b and len({a, c, d, e}) == 4 and (a.bytes, e.bytes) == (100, 0)


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, BLOCK * BLOCKS])
def test_every_byte_of_a_small_file_counts(size: int):
    assert starts(size) == list(range(0, size, BLOCK)) and len(starts(size)) <= BLOCKS


@pytest.mark.parametrize("size", [BLOCK * BLOCKS + 1, 10**9, 10**13])
def test_of_a_large_file_spread_blocks_count_with_its_head_and_tail(size: int):
    at = starts(size)
    gaps = {b - a for a, b in pairwise(at)}
    assert len(at) == BLOCKS and at[0] == 0 and at[-1] == size - BLOCK and max(gaps) - min(gaps) <= 1


def test_a_changed_head_or_tail_of_a_large_file_shows(tmp_path: Path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(40 << 20)  # of zeros, which take no room
    seen = {fingerprint(path)}
    for at in (0, (40 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        seen.add(fingerprint(path))
    assert len(seen) == 3
