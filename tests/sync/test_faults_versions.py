"""Faults in what is published: damaged, forged, out of order, of another past; and bits of every kind. docs/faults.md has the list."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.layout import Block
from slime.sync import fingerprint, staging, wire
from slime.sync.channel import NotProven
from slime.sync.livemap import Live, LiveMap, LiveMove
from slime.sync.manifest import Manifest, ManifestError, PartRef, sign
from slime.sync.publication import Action, Do
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.staging import Stage
from tests.sync.toy_engine import ToyEngine
from tests.sync.world import World, take

pytestmark = pytest.mark.e2e


# --- damage (2) -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: float) -> bytes:
    """One bit of the byte at this share of the length is another."""
    bad = bytearray(data)
    bad[int(at * (len(data) - 1))] ^= 0x10
    return bytes(bad)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "first": lambda data: flipped(data, 0.0),
    "middle": lambda data: flipped(data, 0.5),
    "last": lambda data: flipped(data, 1.0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_and_manifests_change_nothing(damage: str, world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    world.trainer.mutate(2, 0.03)
    bad = DAMAGES[damage]
    tampers: list[Callable[[str, list[bytes]], tuple[str, list[bytes]]]] = [
        lambda manifest, parts: (manifest, [bad(parts[0]), *parts[1:]]),
        lambda manifest, parts: (manifest, [*parts[:-1], bad(parts[-1])]),
        lambda manifest, parts: (bad(manifest.encode()).decode(errors="replace"), parts),
    ]
    for tamper in tampers:
        world.fleet.tamper = tamper
        with pytest.raises(ManifestError, match=r"fetch it again|not this key's|another model"):
            world.channel.publish(1)
        world.check(held)
    world.fleet.tamper = lambda manifest, parts: (manifest, parts[::-1])
    with pytest.raises(ManifestError, match="fetch it again"):
        world.channel.publish(1)
    world.fleet.tamper = lambda manifest, parts: (manifest, parts)
    world.publish()


@pytest.mark.parametrize("damage", ["cut", "empty", "first", "middle"])  # what lies behind the arrays is read by nobody
def test_a_damaged_staged_file_is_not_written(damage: str, world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    [host] = world.fleet.hosts

    def spoil(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.PREPARE:
            path = sorted(host.weights._paths.values())[-1]
            path.write_bytes(DAMAGES[damage](path.read_bytes()))

    world.trainer.mutate(2, 0.03)
    host.before = spoil
    with pytest.raises(
        NotProven, match=r"run/0/1 were not published: engine 0: prepare failed: engine 0 rank . refused to stage: StageError"
    ):
        world.channel.publish(1)
    world.check(held)
    host.before = lambda actions: None
    world.publish()


# --- order and forgery (3, 18) ----------------------------------------------------------------------------------------


def history(model: Path, versions: int, run_id: str = "run", epoch: int = 0) -> tuple[list[tuple[str, list[bytes]]], list[Any]]:
    """What a trainer published to an engine of its own, and the bits of every version."""
    engine = ToyEngine(model, 1)
    world = World(model, [engine], epoch, run_id, key_env="FAULTY_KEY")
    bits = []
    for seed in range(versions):
        world.step(10 * epoch + seed + 1)
        bits.append(world.trainer.copied())
    world.close()
    engine.close()
    return world.fleet.offered, bits


def test_versions_that_are_missing_repeated_or_out_of_order(key: bytes, model: Path, engine: ToyEngine) -> None:
    offered, bits = history(model, 4)
    world = World(model, [engine], key_env="FAULTY_KEY")
    held = -1
    for number in (1, 3, 0, 0, 2, 1, 0, 3, 1, 2, 2, 1, 3, 0, 3):
        if number == held + 1:
            take(world, *offered[number])
            held = number
        else:
            with pytest.raises(ValueError, match=r"is not newer|begins from|decode to other bits"):
                take(world, *offered[number])
        world.check(bits[held] if held >= 0 else world.base)
    assert held == 3
    world.close()


def test_forged_manifests(key: bytes, world: World) -> None:
    """By somebody without the key; and by one who has it, of parts that say what cannot be."""
    world.step(1)
    held = world.trainer.copied()
    world.trainer.mutate(2, 0.03)
    own = world.channel._key

    def forged(sign_with: bytes, **values: Any) -> Callable[[str, list[bytes]], tuple[str, list[bytes]]]:
        return lambda manifest, parts: (sign(replace(Manifest.from_json(manifest), **values), sign_with).to_json(), parts)

    def unsigned(manifest: str, parts: list[bytes]) -> tuple[str, list[bytes]]:
        return replace(Manifest.from_json(manifest), key_id="", mac="").to_json(), parts

    def kept_mac(manifest: str, parts: list[bytes]) -> tuple[str, list[bytes]]:
        return replace(Manifest.from_json(manifest), created_s=1.0).to_json(), parts

    def with_part(change: Callable[[bytes], bytes]) -> Callable[[str, list[bytes]], tuple[str, list[bytes]]]:
        def tamper(manifest: str, parts: list[bytes]) -> tuple[str, list[bytes]]:
            payloads = [*parts[:-1], change(parts[-1])]
            refs = tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads))
            return sign(replace(Manifest.from_json(manifest), parts=refs), own).to_json(), payloads

        return tamper

    def oversize(part: bytes) -> bytes:
        """Tells of 2^32 - 1 rows."""
        fields = list(wire.HEAD.unpack_from(part))
        fields[6] = 2**32 - 1
        return wire.HEAD.pack(*fields) + part[wire.HEAD.size :]

    cases: list[tuple[Any, str]] = [
        (forged(b"another key, long enough"), "key_id .* is not this key's"),
        (unsigned, "not signed, but a key is set"),
        (kept_mac, "mac does not match: the manifest was altered or forged"),
        (forged(own, signature="0" * 32), "serves a model of signature"),
        (forged(own, run_id="other"), "belongs to run run, the weights to run other"),
        (forged(own, parent_root="0" * 32), "begins from run/0/0"),
        (forged(own, fingerprints=(1,) * 9), "decode to other bits than the trainer's"),
        (forged(own, fingerprints=(1,) * 8, changed=(0,) * 8), "8 entries for 9 tensors"),
        (with_part(oversize), "a table of 4294967295 rows"),
        (with_part(lambda part: part[:4] + b"\x09" + part[5:]), "a part in format 9"),
        (with_part(lambda part: b""), "shorter than its head"),
    ]
    for tamper, says in cases:
        world.fleet.tamper = tamper
        with pytest.raises(ValueError, match=says):
            world.channel.publish(1)
        world.check(held)
    world.fleet.tamper = lambda manifest, parts: (manifest, parts)
    world.publish()


def out_of_range(world: World, number: int) -> tuple[str, list[bytes]]:
    """A signed version whose positions lie behind the end of their tensors."""
    spec = world.trainer.spec()
    longer = ModelSpec(tuple(replace(t, shape=(t.size + 3,)) for t in spec.tensors))
    changes = [Changes(i, np.array([t.size + 1]), np.zeros(1, t.type.bits), np.ones(1, t.type.bits)) for i, t in enumerate(spec.tensors)]
    parts = [wire.encode_part(longer, part, [changes[i] for i in part], "steps") for part in spec.parts(1 << 20)]
    signature = bytes.fromhex(spec.signature)
    payloads = []
    for part in parts:
        fields = list(wire.HEAD.unpack_from(part))
        fields[3] = signature
        payloads.append(wire.HEAD.pack(*fields) + part[wire.HEAD.size :])
    refs = tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads))
    last = Manifest.from_json(world.fleet.offered[-1][0])
    made = replace(
        last, number=number, parent_epoch=last.epoch, parent_number=last.number, parent_root=last.root, parts=refs, mac="", key_id=""
    )
    return sign(made, world.channel._key).to_json(), payloads


def test_positions_behind_the_end_of_a_tensor(world: World) -> None:
    world.step(1)
    with pytest.raises(wire.WireError, match="positions out of bounds"):
        take(world, *out_of_range(world, 1))
    world.check()
    world.step(2)


# --- another past (4) -------------------------------------------------------------------------------------------------


def test_an_engine_that_another_run_left(key: bytes, model: Path, engine: ToyEngine) -> None:
    """It is at version 3 of another run, which a number alone would take for this run's."""
    other = World(model, [engine], run_id="other", key_env="FAULTY_KEY")
    for seed in range(4):
        other.step(seed + 1)
    other.close()
    world = World(model, [engine], key_env="FAULTY_KEY")
    world.check(world.base)
    for seed in range(5):
        world.step(100 + seed)
        with pytest.raises(ValueError, match="belongs to run run, the weights to run other: clear the directory they came from"):
            take(world, *other.fleet.offered[3])
        world.check()
    world.close()


def test_versions_of_an_older_epoch(key: bytes, model: Path, engine: ToyEngine) -> None:
    """A resumed trainer went on from 0/1 under epoch 1; what the old one still sends is no version of this past."""
    offered, bits = history(model, 4)
    world = World(model, [engine], epoch=1, key_env="FAULTY_KEY")
    world.trainer.now = [b.copy() for b in bits[1]]
    world.number = 0
    world.publish()
    for manifest, parts in offered:
        with pytest.raises(ValueError, match="is not newer"):
            take(world, manifest, parts)
        world.check()
    world.step(7)
    world.close()


# --- bits of every kind (11, 20, 22) ----------------------------------------------------------------------------------


def test_nothing_everything_and_there_and_back(world: World) -> None:
    """Also several optimizer steps in one publication, and a spike of density in the middle of a run."""
    start = world.trainer.copied()
    world.step(1, 0.02)
    sparse = world.trainer.copied()
    world.publish()  # nothing
    assert Manifest.from_json(world.fleet.offered[-1][0]).changed == (0,) * 9
    for seed in range(4):
        world.trainer.mutate(10 + seed, 0.05)
    world.publish()
    for bits in world.trainer.now:
        bits[:] = ~bits
    world.publish()
    manifest, parts = world.fleet.offered[-1]
    spec = world.trainer.spec()
    found = [block for part, payload in zip(spec.parts(1 << 20), parts, strict=True) for block in wire.describe_part(spec, part, payload)]
    assert Manifest.from_json(manifest).changed == tuple(t.size for t in spec.tensors)
    assert next(block for block in found if block.tensor == "big").codec == "dense"
    assert all(block.changed == spec.tensors[spec.index[block.tensor]].size for block in found)
    world.step(14, 0.02)
    manifest, parts = world.fleet.offered[-1]
    assert sum(map(len, parts)) < spec.nbytes / 10, "it is sparse again"
    world.trainer.now = [bits.copy() for bits in sparse]
    world.publish()
    world.trainer.now = [bits.copy() for bits in start]
    world.publish()
    world.trainer.mutate(15, 0.3)
    world.trainer.now = [bits.copy() for bits in start]
    world.publish()
    assert Manifest.from_json(world.fleet.offered[-1][0]).changed == (0,) * 9


def test_tensors_of_more_than_two_to_the_31_elements(tmp_path: Path) -> None:
    """Positions on both sides of 2^31 and 2^32. Memory that nobody writes to costs nothing."""
    for size, dtype in ((2**31 + 9, "int8"), (2**32 + 1001, "uint8")):
        model = ModelSpec((TensorSpec("small", (3,), "bfloat16"), TensorSpec("large", (size,), dtype)))
        positions = np.array([0, 254, 2**20, 2**31 - 1, 2**31, *((2**32 - 1, 2**32) if size > 2**32 else ()), size - 1], np.int64)
        new = np.arange(1, len(positions) + 1, dtype=np.uint8)
        old = np.zeros(size, np.uint8)
        changes = Changes(1, positions, np.zeros(len(positions), np.uint8), new)
        payload = wire.encode_part(model, range(2), [changes], "steps")
        assert len(payload) < 2000
        [found] = wire.decode_part(model, range(2), payload, lambda tensor, old=old: old if tensor else np.zeros(3, np.uint16))
        assert (found.positions == positions).all() and (found.new == new).all() and not found.old.any()
        block = Block(0, (size,), (1,))
        live = LiveMap(model.signature, (Live("large", dtype, size),), (LiveMove(1, block, 0, block),), {}, (), {}, {})
        stage = Stage(live, fingerprint.run_key("run"))
        stage.add(stage.pieces(found))
        stage.write(tmp_path / "staged", "run/0/1", "run/0/0")
        [width] = staging.read(tmp_path / "staged", live, fingerprint.run_key("run")).widths
        segments = width.segments(np.zeros(1, np.uint64))
        at = [int(s["address"]) + int(i) for s in segments for i in width.index[int(s["at"]) : int(s["at"] + s["count"])]]
        assert at == positions.tolist() and (width.bits == new).all()
        assert len(segments) == (2 if size > 2**32 else 1)
