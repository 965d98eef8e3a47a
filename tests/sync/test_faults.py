"""Faults of the weight channel without SGLang; docs/faults.md has the list. Every case ends with engines that hold, bit for bit, a version
that was committed, or with an error that has a name and engines that get no requests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.sync import inserver, wire
from slime.sync.channel import NotProven
from slime.sync.manifest import Manifest, ManifestError, PartRef, sign
from slime.sync.publication import Action, Do, Phase, Publication
from slime.sync.records import Changes, ModelSpec
from tests.engine.weights_double import Bits, Host
from tests.sync import faulty, toy_engine
from tests.sync.faulty import Fleet, open_channel, recipe
from tests.sync.toy_engine import ToyEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_engine.make_model(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture(autouse=True)
def ranks_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inserver, "_rank", toy_engine.this_rank)


@pytest.fixture
def engine(model: Path) -> Iterator[ToyEngine]:
    """Of two ranks."""
    made = ToyEngine(model)
    yield made
    made.stop()


@pytest.fixture
def world(model: Path, engine: ToyEngine) -> Iterator["World"]:
    made = World(model, [engine])
    yield made
    made.close()


class World:
    """A trainer, a channel, and a host for each engine."""

    def __init__(self, model: Path, engines: list[Any], epoch: int = 0, run_id: str = "run", **sync: Any) -> None:
        self.engines, self.model = engines, model
        self.cfg = recipe(model, engines[0].ranks, **sync)
        self.trainer = Bits(model)
        self.base = self.trainer.copied()
        self.fleet = Fleet([Host(self.cfg, [engine]) for engine in engines])
        self.channel = open_channel(self.cfg, self.trainer, self.fleet, epoch, run_id)
        self.number, self.label = -1, f"{run_id}/{epoch}/"

    def close(self) -> None:
        for host in self.fleet.hosts:
            host.close()

    def step(self, seed: int, share: float = 0.1) -> None:
        """Other weights, published."""
        self.trainer.mutate(seed, share)
        self.publish()

    def publish(self) -> None:
        self.number += 1
        self.channel.publish(self.number)
        self.check()

    def check(self, bits: list[Any] | None = None) -> None:
        """All engines go on, with these bits and the label of the last version."""
        for engine in self.engines:
            assert engine.holds(self.trainer.now if bits is None else bits)
            assert not engine.paused and not engine.session
            assert bits is not None or engine.label == f"{self.label}{self.number}"


def test_a_world_without_faults(world: World) -> None:
    """And that the check of it can fail."""
    world.check(world.base)
    world.step(1)
    world.step(2)
    assert not world.engines[0].holds(world.base)
    world.engines[0].models[1].fused.data[3, 3] += 1
    assert not world.engines[0].holds(world.trainer.now)


# --- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", faulty.POINTS)
def test_a_new_agent_takes_over_where_one_was_killed(point: str, model: Path, engine: ToyEngine) -> None:
    faulty.kill_an_agent(recipe(model, 2), engine.spec.endpoint, point)
    world = World(model, [engine], epoch=1)
    try:
        world.check(world.base)
        world.step(1)
        world.step(3)
    finally:
        world.close()


# --- 2 ----------------------------------------------------------------------------------------------------------------


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
    world.trainer.mutate(2, 0.2)
    bad = DAMAGES[damage]
    tampers: list[Callable[[str, list[bytes]], tuple[str, list[bytes]]]] = [
        lambda manifest, parts: (manifest, [bad(parts[0]), *parts[1:]]),
        lambda manifest, parts: (manifest, [*parts[:-1], bad(parts[-1])]),
        lambda manifest, parts: (bad(manifest.encode()).decode(errors="replace"), parts),
    ]
    for tamper in tampers:
        world.fleet.tamper = tamper
        with pytest.raises(ManifestError, match="fetch it again|not this key's|another model"):
            world.channel.publish(1)
        world.check(held)
    world.fleet.tamper = lambda manifest, parts: (manifest, parts[::-1])
    with pytest.raises(ManifestError, match="fetch it again"):
        world.channel.publish(1)
    world.fleet.tamper = lambda manifest, parts: (manifest, parts)
    world.publish()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_staged_file_is_not_written(damage: str, world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    [host] = world.fleet.hosts

    def spoil(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.PREPARE:
            path = sorted(host.weights._paths.values())[-1]
            path.write_bytes(DAMAGES[damage](path.read_bytes()))

    world.trainer.mutate(2, 0.2)
    if damage == "longer":  # what lies behind the arrays is read by nobody
        host.before = spoil
        world.publish()
        return
    host.before = spoil
    with pytest.raises(NotProven, match=r"run/0/1 were not published: engine 0: prepare failed: engine 0 rank . refused to stage: StageError"):
        world.channel.publish(1)
    world.check(held)
    host.before = lambda actions: None
    world.publish()


# --- 3, 18 ------------------------------------------------------------------------------------------------------------


def take(world: World, manifest: str, parts: list[bytes]) -> None:
    """Offer a version and drive it to its end, as a channel does. Raises what the offer raised."""
    world.fleet.offer(manifest, parts, 10)
    label = Manifest.from_json(manifest).label
    publication = Publication(world.fleet.engines())
    due = publication.begin()
    while not publication.ended:
        due = publication.commit() if publication.phase is Phase.PREPARED else due
        answers = world.fleet.perform([a for a in due if a.do is not Do.ACKNOWLEDGE], label, 10)
        if Action(Do.ACKNOWLEDGE) in due:
            world.fleet.advance(label, 10)
        due = [a for answer in answers for a in (publication.failed if answer.failed else _done(publication))(answer.action, *_why(answer))]
    assert publication.phase is Phase.DONE, publication.reason


def _done(publication: Publication) -> Callable[..., list[Action]]:
    return lambda action: publication.done(action)


def _why(answer: Any) -> list[str]:
    return [answer.failed] if answer.failed else []


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """One that outlives a channel."""
    monkeypatch.setenv("FAULTY_KEY", "k" * 32)
    return b"k" * 32


def history(model: Path, versions: int, run_id: str = "run", epoch: int = 0) -> tuple[list[tuple[str, list[bytes]]], list[Any]]:
    """What a trainer published to an engine of its own, and the bits of every version."""
    engine = ToyEngine(model, 1)
    world = World(model, [engine], epoch, run_id, key_env="FAULTY_KEY")
    bits = []
    for seed in range(versions):
        world.step(10 * epoch + seed + 1)
        bits.append(world.trainer.copied())
    world.close()
    engine.stop()
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
            with pytest.raises(ValueError, match="is not newer|begins from|decode to other bits"):
                take(world, *offered[number])
        world.check(bits[held] if held >= 0 else world.base)
    assert held == 3
    world.close()


def test_forged_manifests(key: bytes, world: World) -> None:
    """By somebody without the key; and by one who has it, of parts that say what cannot be."""
    world.step(1)
    held = world.trainer.copied()
    world.trainer.mutate(2, 0.2)
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
    made = replace(last, number=number, parent_epoch=last.epoch, parent_number=last.number, parent_root=last.root, parts=refs, mac="", key_id="")
    return sign(made, world.channel._key).to_json(), payloads


def test_positions_behind_the_end_of_a_tensor(world: World) -> None:
    world.step(1)
    with pytest.raises(wire.WireError, match="positions out of bounds"):
        take(world, *out_of_range(world, 1))
    world.check()
    world.step(2)


# --- 4 ----------------------------------------------------------------------------------------------------------------


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
