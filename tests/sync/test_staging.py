"""Staged files: what lands where, base check, and that a damaged or hostile file is refused before anything is written."""

import json
import os
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.layout import Block
from slime.sync import fingerprint, native, staging
from slime.sync.livemap import Live, LiveMap, LiveMove
from slime.sync.records import Changes
from slime.sync.staging import PLACE, Stage, StageError

KEY = fingerprint.run_key("run")
# tensor 0 [40, 60] bf16: its columns from 30 on in live 0; tensor 1 [3000] fp32 in live 1, from 1000 on in live 2 too; tensor 2 of 9 bytes
MAP = LiveMap(
    "model",
    (Live("cols", "bfloat16", 1300), Live("whole", "float32", 3000), Live("tied", "float32", 2048), Live("bytes", "uint8", 16)),
    (
        LiveMove(0, Block(30, (40, 30), (60, 1)), 0, Block(100, (40, 30), (30, 1))),
        LiveMove(1, Block(0, (3000,), (1,)), 1, Block(0, (3000,), (1,))),
        LiveMove(1, Block(1000, (2000,), (1,)), 2, Block(48, (2000,), (1,))),
        LiveMove(2, Block(0, (9,), (1,)), 3, Block(7, (9,), (1,))),
    ),
    {},
    (),
    {},
    {0: ((0, 100),), 2: ((0, 48),), 3: ((0, 7),)},
)
SIZES = {0: (2400, "<u2"), 1: (3000, "<u4"), 2: (9, "u1")}


def memory(seed: int) -> tuple[dict[int, np.ndarray], list[np.ndarray]]:
    """HF tensors, and the storages that hold them."""
    random = np.random.default_rng(seed)
    hf = {t: random.integers(0, 256, n * np.dtype(d).itemsize, dtype=np.uint8).view(d) for t, (n, d) in SIZES.items()}
    lives = [np.zeros(live.size, f"<u{live.width}") for live in MAP.lives]
    fill(hf, lives)
    return hf, lives


def fill(hf: dict[int, np.ndarray], lives: list[np.ndarray]) -> None:
    for move in MAP.moves:
        move.target.view(lives[move.live])[...] = move.source.view(hf[move.tensor])


def changed(old: np.ndarray, tensor: int, positions: Any, seed: int = 1) -> Changes:
    positions = np.asarray(positions, np.int64)
    new = np.random.default_rng(seed).integers(0, 256, len(positions) * old.itemsize, dtype=np.uint8).view(old.dtype)
    return Changes(tensor, positions, old[positions], new)


def some(hf: dict[int, np.ndarray]) -> list[Changes]:
    random = np.random.default_rng(3)
    return [
        changed(hf[0], 0, np.flatnonzero(random.random(2400) < 0.2)),
        changed(hf[1], 1, np.r_[np.flatnonzero(random.random(900) < 0.1), 950:2900]),  # scattered, then a run across the second move's edge
        changed(hf[2], 2, [0, 8]),
    ]


def write(tmp_path: Path, changes: list[Changes]) -> Path:
    stage = Stage(MAP, KEY)
    for each in changes:
        stage.add(stage.pieces(each))
    path = tmp_path / "staged"
    assert stage.write(path, "run/0/1", "run/0/0") == path.stat().st_size
    return path


def test_what_is_staged_lands_where_the_map_says(tmp_path: Path) -> None:
    hf, lives = memory(0)
    changes = some(hf)
    staged = staging.read(write(tmp_path, changes), MAP, KEY)
    assert (staged.version, staged.parent) == ("run/0/1", "run/0/0") and staged.lives == {0, 1, 2, 3}
    assert any(place["run"] for part in staged.widths for place in part.places), "the long run is a segment of its own"
    addresses = np.array([live.ctypes.data for live in lives], np.uint64)
    for part in staged.widths:
        segments, found = part.segments(addresses), np.zeros_like(part.bits)
        native.gather(segments, np.array(part.index), found)
        table = fingerprint.table(KEY)
        assert fingerprint.full(found, fingerprint.tensor_key(KEY, staging.BASE), table) == part.base
        native.scatter(segments, np.array(part.index), np.array(part.bits))
    for each in changes:
        hf[each.tensor][each.positions] = each.new
    expected = [np.zeros_like(live) for live in lives]
    fill(hf, expected)
    assert all((mine == theirs).all() for mine, theirs in zip(lives, expected, strict=True))


def test_pieces_of_a_tensor_and_their_order_do_not_matter_to_where_they_land(tmp_path: Path) -> None:
    hf, lives = memory(0)
    [first, *rest] = some(hf)
    half = len(first) // 2
    pieces = [Changes(0, first.positions[part], first.old[part], first.new[part]) for part in (slice(half, None), slice(0, half))]
    found = []
    for changes in ([first, *rest], [*pieces, *rest]):
        copy = [live.copy() for live in lives]
        for part in staging.read(write(tmp_path, changes), MAP, KEY).widths:
            native.scatter(
                part.segments(np.array([live.ctypes.data for live in copy], np.uint64)), np.array(part.index), np.array(part.bits)
            )
        found.append(copy)
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def by_element(changes: Changes) -> list[tuple[int, bool, list[int]]]:
    """What the segments of a tensor are: (storage, whether consecutive, its positions), found position by position."""
    found = []
    for move in (each for each in MAP.moves if each.tensor == changes.tensor):
        inside, index = move.source.find(changes.positions)
        there = move.target.at(index[inside])
        stretches = np.split(there, np.flatnonzero(np.diff(there) != 1) + 1)
        scattered = np.concatenate([each if len(each) < staging.RUN_AT else each[:0] for each in stretches])
        found += [(move.live, False, scattered.tolist())] if len(scattered) else []
        found += [(move.live, True, each.tolist()) for each in stretches if len(each) >= staging.RUN_AT]
    return found


@pytest.mark.parametrize("density", [0.01, 0.5, 0.95, 1])
def test_segments_are_those_of_every_element(density: float, tmp_path: Path) -> None:
    """Rows of which all columns are listed follow one another in the storage: one segment through all of them, without indices."""
    hf, _ = memory(0)
    random = np.random.default_rng(5)
    for tensor, rows in ((0, slice(0, 0)), (0, slice(300, 1800)), (1, slice(900, 2100))):
        listed = random.random(len(hf[tensor])) < density
        listed[rows] = True
        changes = changed(hf[tensor], tensor, np.flatnonzero(listed))
        (part,) = staging.read(write(tmp_path, [changes]), MAP, KEY).widths
        found = []
        for place in part.places:
            first, count, at = (int(place[name]) for name in ("first", "count", "at"))
            index = np.arange(count) if place["run"] else part.index[at : at + count].astype(np.int64)
            there = int(place["offset"]) + index
            found.append((int(place["live"]), bool(place["run"]), there.tolist()))
            for move in (each for each in MAP.moves if each.tensor == tensor and each.live == place["live"]):
                _, index = move.target.find(there)
                entries = np.searchsorted(changes.positions, move.source.at(index))
                assert np.array_equal(part.bits[first : first + count], changes.new[entries])
        assert found == by_element(changes)


def test_many_small_tensors_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and experts: compiled code is called for many of them at once, and the file is what it would be without."""
    hf, _ = memory(0)
    pieces = [changed(hf[1], 1, [position, position + 1]) for position in range(0, 3000, 2)]
    monkeypatch.setattr(staging, "CHUNK", 1)
    each = write(tmp_path, pieces).read_bytes()
    for chunk, most in ((1000, 16), (1 << 16, 4)):
        monkeypatch.setattr(staging, "CHUNK", chunk)
        calls, full = [], fingerprint.full
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "full", lambda *args, calls=calls, full=full: calls.append(1) or full(*args))
            path = write(tmp_path, pieces)
        assert path.read_bytes() == each and len(calls) <= most
    staged = staging.read(path, MAP, KEY)
    assert staged.entries == 3000 + 2000, "of the tensor and of its tied part"


def test_a_stage_may_be_written_again(tmp_path: Path) -> None:
    """As for engines whose ranks have one map."""
    hf, _ = memory(0)
    stage = Stage(MAP, KEY)
    for changes in some(hf):
        stage.add(stage.pieces(changes))
    for name in ("one", "two"):
        stage.write(tmp_path / name, "r/0/1", "r/0/0")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert staging.read(tmp_path / "two", MAP, KEY).entries > 0


def test_another_base_has_another_fingerprint(tmp_path: Path) -> None:
    hf, _ = memory(0)
    changes = some(hf)
    base = staging.read(write(tmp_path, changes), MAP, KEY).widths[1].base
    changes[0].old[np.flatnonzero(changes[0].positions % 60 >= 30)[0]] ^= 1
    assert staging.read(write(tmp_path, changes), MAP, KEY).widths[1].base != base


def test_nothing_for_this_rank(tmp_path: Path) -> None:
    hf, _ = memory(0)
    staged = staging.read(write(tmp_path, [changed(hf[0], 0, [5, 61])]), MAP, KEY)
    assert not staged.entries and not staged.widths


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    hf, _ = memory(0)
    path = write(tmp_path, some(hf))
    good = path.read_bytes()
    header = struct.unpack_from("<16sQ16s", good)[1]
    body = -(-(staging.HEAD.size + header) // 64) * 64
    used = np.zeros(len(good), bool)
    used[: staging.HEAD.size + header] = True
    for where in json.loads(good[staging.HEAD.size : staging.HEAD.size + header])["widths"].items():
        for name, item in (("places", PLACE.itemsize), ("index", 4), ("bits", int(where[0]))):
            start, count = where[1][name]
            used[body + start : body + start + count * item] = True
    random = np.random.default_rng(0)
    for at in random.choice(np.flatnonzero(used), 150, replace=False).tolist():
        bad = bytearray(good)
        bad[at] ^= 1 << random.integers(8)
        path.write_bytes(bad)
        with pytest.raises(StageError):
            staging.read(path, MAP, KEY)
    for length in (0, 10, 40, header, body, len(good) - 64, len(good) - 1):
        path.write_bytes(good[:length])
        if length < np.flatnonzero(used)[-1]:
            with pytest.raises(StageError):
                staging.read(path, MAP, KEY)


def forged(path: Path, places: np.ndarray, index: list[int], entries: int, width: int = 2, **other: Any) -> Path:
    """A file whose digests are right, whatever it holds."""
    index_, bits = np.array(index, "<u4"), np.zeros(entries, f"<u{width}")
    arrays = {"places": places, "index": index_, "bits": bits}
    table = fingerprint.table(KEY)
    where: dict[str, Any] = {"base": "0" * 16, "digest": f"{staging.digest({n: [a] for n, a in arrays.items()}, KEY, table):016x}"}
    body = bytearray()
    for name, array in arrays.items():
        where[name] = [len(body), len(array)]
        body += array.tobytes()
        body += bytes(-len(body) % 64)
    record = {"version": "a", "parent": "b", "map": MAP.signature, "widths": {str(width): where | other}, "bytes": len(body)}
    header = json.dumps(record).encode()
    head = staging.HEAD.pack(staging.MAGIC, len(header), blake2b(header, digest_size=16).digest()) + header
    path.write_bytes(head + bytes(-len(head) % 64) + bytes(body))
    return path


def place(**fields: int) -> np.ndarray:
    found = np.zeros(1, PLACE)
    found["count"] = 1
    for name, value in fields.items():
        found[name] = value
    return found


BAD: dict[str, Callable[[Path], Path]] = {
    "outside its storage": lambda p: forged(p, place(offset=1299), [1], 1),
    "outside its storage ": lambda p: forged(p, place(offset=1299, run=1, count=2), [], 2),
    "outside its storage  ": lambda p: forged(p, np.concatenate([place(count=2), place(first=2, at=2)]), [0, 1300, 5], 3),
    "outside its storage   ": lambda p: forged(p, place(live=1), [0], 1),  # a storage of another width
    "names no storage": lambda p: forged(p, place(live=4), [0], 1),
    "names no storage ": lambda p: forged(p, place(run=2), [0], 1),
    "impossible count": lambda p: forged(p, place(offset=2**63), [0], 1),
    "impossible count ": lambda p: forged(p, place(count=0), [], 0),
    "each once": lambda p: forged(p, place(first=1), [0], 1),
    "each once ": lambda p: forged(p, place(at=1), [0], 1),
    "each once  ": lambda p: forged(p, place(count=2), [0, 1], 1),
    "each once   ": lambda p: forged(p, place(), [0, 1], 1),
    "each once    ": lambda p: forged(p, place()[:0], [], 1),
    "elements of 3 bytes": lambda p: width_of(p, "3"),
    "ends outside": lambda p: forged(p, place(), [0], 1, bits=[128, 1000]),
    "an array lies": lambda p: forged(p, place(), [0], 1, bits=[-64, 1]),
    "an array lies ": lambda p: forged(p, place(), [0], 1, bits=[1 << 70, 1]),
    "not one": lambda p: forged(p, place(), [0], 1, bits=7),
    "not one ": lambda p: forged(p, place(), [0], 1, base="x"),
}


def width_of(path: Path, width: str) -> Path:
    text = forged(path, place(), [0], 1).read_bytes()
    length = struct.unpack_from("<16sQ16s", text)[1]
    header = text[40 : 40 + length].replace(b'{"2":', b'{"%s":' % width.encode())
    path.write_bytes(staging.HEAD.pack(staging.MAGIC, length, blake2b(header, digest_size=16).digest()) + header + text[40 + length :])
    return path


@pytest.mark.parametrize("why", BAD)
def test_a_forged_file_writes_nowhere_else(why: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=why.strip()):
        staging.read(BAD[why](tmp_path / "staged"), MAP, KEY)


def test_a_good_forgery_is_read(tmp_path: Path) -> None:
    """So that the ones above are refused for what they say."""
    assert staging.read(forged(tmp_path / "staged", place(offset=1299), [0], 1), MAP, KEY).entries == 1


def test_a_file_for_another_map_is_refused(tmp_path: Path) -> None:
    hf, _ = memory(0)
    other = LiveMap("model", MAP.lives, MAP.moves[:-1], {}, (), {}, MAP.foreign)
    with pytest.raises(StageError, match="another live map; learn again"):
        staging.read(write(tmp_path, some(hf)), other, KEY)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    hf, _ = memory(0)
    write(tmp_path, some(hf))
    assert os.listdir(tmp_path) == ["staged"]
