"""Faults of the weight channel without SGLang; docs/faults.md has the list. Every case ends with engines that hold, bit for bit, a version
that was committed, or with an error that has a name and engines that get no requests."""

import contextlib
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.cluster import shared_folder
from slime.engine.live import LiveEngine
from slime.layout import Block
from slime.sync import chain, fingerprint, fold, inserver, native, staging, transport, wire
from slime.sync.channel import NotProven
from slime.sync.kernels.scatter import Scatter, unsigned
from slime.sync.livemap import Live, LiveMap, LiveMove
from slime.sync.manifest import Manifest, ManifestError, PartRef, sign, verify
from slime.sync.places import Missing
from slime.sync.publication import Action, Do, Phase, Publication
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.staging import Stage
from slime.sync.store import SplitBrain, WeightStore
from slime.sync.store_fsspec import open_store
from slime.sync.store_local import LocalStore
from tests.engine.weights_double import Bits, Host
from tests.sync import faulty, toy_engine
from tests.sync.faulty import Fleet, Proxy, open_channel, recipe
from tests.sync.toy_engine import ToyEngine

pytestmark = pytest.mark.e2e


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

    def __init__(
        self, model: Path, engines: list[Any], epoch: int = 0, run_id: str = "run", where: Path = Path("none"), **sync: Any
    ) -> None:
        self.engines, self.model = engines, model
        self.cfg = recipe(model, engines[0].ranks, **sync)
        self.trainer = Bits(model)
        self.base = self.trainer.copied()
        self.fleet = Fleet([Host(recipe(model, engine.ranks, **sync), [engine]) for engine in engines])
        self.channel = open_channel(self.cfg, self.trainer, self.fleet, epoch, run_id, where)
        self.number, self.label = -1, f"{run_id}/{self.channel._run.epoch}/"

    def close(self) -> None:
        for host in self.fleet.hosts:
            host.close()

    def step(self, seed: int, share: float = 0.03) -> None:
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


# --- 5, 14, 16, 17: with files ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The trainer's end."""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are bytes where Ray would have references."""
    monkeypatch.setattr(transport.deadline, "get", lambda refs, *_: refs)


def kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, ended: bool, condition: Callable[..., bool] | None = None
) -> None:
    """The trainer ends at the `call`-th call of a method, before or after it."""
    do, count = getattr(owner, name), iter(range(10**6))

    def dies(*args: Any, **kwargs: Any) -> Any:
        last = (condition is None or condition(*args)) and next(count) == call
        if last and not ended:
            raise Killed
        result = do(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dies)


def doing(do: Do) -> Callable[..., bool]:
    return lambda self, actions, *_: any(action.do is do for action in actions)


DEATHS: dict[str, tuple[Any, str, int, bool, Any]] = {
    "before any part": (LocalStore, "put", 0, False, None),
    "between parts": (LocalStore, "put", 1, False, None),
    "before the manifest": (WeightStore, "_move", 0, False, None),
    "after the manifest": (WeightStore, "publish", 0, True, None),
    "after the offer": (Fleet, "offer", 0, True, None),
    "before the commit": (Fleet, "perform", 0, False, doing(Do.COMMIT)),
    "after the commit": (Fleet, "perform", 0, True, doing(Do.COMMIT)),
    "before the acknowledgement": (Bits, "acknowledge", 0, False, None),
    "after the acknowledgement": (Bits, "acknowledge", 0, True, None),
    "after the host copies": (Fleet, "advance", 0, True, None),
    "while files are deleted": (WeightStore, "remove", 0, False, None),
}


@pytest.mark.parametrize("point", DEATHS)
def test_a_trainer_is_killed_and_resumes_from_an_older_checkpoint(
    point: str, key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"key_env": "FAULTY_KEY", "transport": "store", "keep": 1, "anchor_every": 2}
    world = World(model, [engine], where=tmp_path, **settings)
    saved: list[Any] = []
    for seed in range(4):
        world.step(seed + 1)
        saved.append(world.trainer.copied())
    with monkeypatch.context() as patch:
        kill_at(patch, *DEATHS[point])
        world.trainer.mutate(9, 0.1)
        with pytest.raises(Killed):
            world.channel.publish(4)
    unsaved = world.trainer.copied()
    world.close()
    check_files(tmp_path, world, key, {3: saved[3], 4: unsaved})

    world = World(model, [engine], where=tmp_path, **settings)
    assert world.label == "run/1/"
    world.check(world.base)
    world.trainer.now, world.number = [bits.copy() for bits in saved[1]], 0
    world.publish()
    check_files(tmp_path, world, key, {1: saved[1]})
    for seed in range(3):
        world.step(20 + seed)
        check_files(tmp_path, world, key, {world.number: world.trainer.now})
    left = list(WeightStore(open_store(str(tmp_path), 10), "run", key).manifests())
    assert {manifest.epoch for manifest in left} == {1}, "what was before the resume is needed by nobody and stays"
    world.close()


def check_files(where: Path, world: World, key: bytes, may_be: dict[int, list[Any]]) -> None:
    """A chain of files leads from the model directory, or an anchor, to the newest version, and its bits are what the trainer had."""
    store = WeightStore(open_store(str(where), 10), "run", key)
    newest = store.latest()
    assert newest is not None
    manifests = list(store.manifests())
    weights = fold.Weights(world.trainer.spec(), "run", [bits.copy() for bits in world.base])
    for step in chain.plan(manifests, (newest.epoch, newest.number), None, weights.root).steps:
        verify(step, key)
        weights.apply(step, store.parts(step))
    assert weights.root == newest.root
    assert all((a == b).all() for a, b in zip(weights.bits, may_be[newest.number], strict=True)), newest


def test_of_two_trainers_the_one_that_came_first_stops(key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    first = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store")
    first.step(1)
    second = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store")
    second.step(2)
    first.trainer.mutate(3, 0.03)
    with pytest.raises(SplitBrain, match="must stop"):
        first.channel.publish(1)
    second.check()
    second.step(4)
    check_files(tmp_path, second, key, {1: second.trainer.now})
    first.close()
    second.close()


def test_of_two_agents_the_one_that_came_first_cannot_write(key: bytes, model: Path, engine: ToyEngine) -> None:
    """Without files nobody claims anything: what the second has not published, the engine does not take from the first."""
    first = World(model, [engine], key_env="FAULTY_KEY")
    first.step(1)
    second = World(model, [engine], epoch=1, key_env="FAULTY_KEY")
    second.step(2)
    first.trainer.mutate(3, 0.03)
    with pytest.raises(NotProven, match=r"run/0/1 were not published: engine 0: prepare failed: engine 0 rank . at .* was lost"):
        first.channel.publish(1)
    second.check()
    second.step(4)
    first.close()
    second.close()


def test_files_that_a_late_joiner_reads_stay(key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    world = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store", keep=1, anchor_every=2)
    world.step(1)
    store = WeightStore(open_store(str(tmp_path), 10), "run", key)
    root = fold.Weights(world.trainer.spec(), "run", [bits.copy() for bits in world.base]).root
    plan = chain.plan(list(store.manifests()), (0, 0), None, root)
    store.put_lease(chain.lease("late-joiner", plan, time.time(), 600.0))
    for seed in range(8):
        world.step(seed + 2)
    assert all(store.parts(step) for step in plan.steps), "they were deleted while they were read"
    kept = len(list(store.manifests()))
    store.drop_lease("late-joiner")
    world.step(20)
    world.step(21)
    assert len(list(store.manifests())) < kept + 2
    with pytest.raises(Missing):
        store.parts(plan.steps[0])
    world.close()


# --- 6, 7, 8: in the engine -------------------------------------------------------------------------------------------


@pytest.fixture
def two(model: Path, engine: ToyEngine) -> Iterator[World]:
    """Engines of two ranks and of one, on a host each."""
    other = ToyEngine(model, 1, "engine 1")
    made = World(model, [engine, other])
    yield made
    made.close()
    other.stop()


def restart(world: World, number: int) -> None:
    """What the agent does with an engine whose process has ended."""
    host, engine = world.fleet.hosts[number], world.engines[number]
    engine.start()
    host.live = [LiveEngine(engine.spec.endpoint, engine.ranks, host._session, engine)]
    host.run(host.weights.take_in(host.live[0]))


def crash_when(operation: str, ended: bool) -> tuple[str, toy_engine.Hook]:
    """The engine's process ends when it is asked this, or before it says what came of it."""

    async def hook(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) == operation:
            engine.crash()
            raise ConnectionError

    return ("after" if ended else "before"), hook


CRASHES = {
    "prepared": ("/pause_generation", False),
    "paused": ("/pause_generation", True),
    "in the session": ("/begin_weight_update", True),
    "asked to commit": ("commit", False),
    "committed": ("commit", True),
    "after its session": ("/end_weight_update", True),
    "going on": ("/continue_generation", False),
    "gone on": ("/continue_generation", True),
}


@pytest.mark.parametrize("when", CRASHES)
def test_an_engine_ends_in_the_middle_of_a_publication(when: str, two: World) -> None:
    two.step(1)
    held = two.trainer.copied()
    side, hook = crash_when(*CRASHES[when])
    setattr(two.engines[1], side, hook)
    two.trainer.mutate(2, 0.03)
    proven = when in ("going on", "gone on")
    if proven:
        two.channel.publish(1)
        two.number = 1
    else:
        with pytest.raises(NotProven, match=r"were not published: engine 1: commit failed: engine 1 .* was lost during"):
            two.channel.publish(1)
    assert two.engines[0].holds(two.trainer.now if proven else held) and not two.engines[0].paused
    setattr(two.engines[1], side, None)
    restart(two, 1)
    two.check(two.trainer.now if proven else held)
    two.step(3)


def test_an_engine_that_restarted_by_itself_between_prepare_and_commit(two: World) -> None:
    """It answers, with the model directory's weights: they are not taken for what was staged."""
    two.step(1)
    held = two.trainer.copied()

    def again(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.COMMIT:
            two.engines[1].crash()
            two.engines[1].start()

    two.fleet.hosts[1].before = again
    two.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match=r"were not published: engine 1: commit failed: .*; fenced: engine 1"):
        two.channel.publish(1)
    assert two.engines[0].holds(held) and not two.engines[0].paused
    assert two.engines[1].paused and two.engines[1].holds(two.base) and two.fleet.engines() == ["engine 0"]
    two.fleet.hosts[1].before = lambda actions: None
    restart(two, 1)
    two.check(held)
    two.step(3)


class Writes:
    """Scatters of the model's ranks that fail, half done: the next `times` ones of `rank`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.times, self.error = 1, 0, RuntimeError("no memory")
        self.failed = 0
        write, writes = Scatter.write, self

        def fails(scatter: Scatter) -> None:
            if writes.times and toy_engine.this_rank() == writes.rank:
                writes.times -= 1
                writes.failed += 1
                half = scatter.segments[: max(1, len(scatter.segments) // 2)]
                native.scatter(half, unsigned(scatter.index), unsigned(scatter.bits))
                raise writes.error
            write(scatter)

        monkeypatch.setattr(Scatter, "write", fails)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_one_rank_fails_while_the_other_writes(times: int, writes: Writes, two: World) -> None:
    """And fails again while it puts the old bits back, once by itself and once when it is told to."""
    two.step(1)
    held = two.trainer.copied()
    writes.times = times
    two.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match="engine 0: commit failed: rank 1: RuntimeError: no memory") as raised:
        two.channel.publish(1)
    assert writes.failed == times and two.engines[1].holds(held) and not two.engines[1].paused
    if times == 3:
        assert "fenced: engine 0" in str(raised.value) and two.fleet.engines() == ["engine 1"]
        assert two.engines[0].paused and two.engines[0].label == "run/fenced"
        restart(two, 0)
    two.check(held)
    two.step(3)


@pytest.mark.parametrize("times", [1, 5])
def test_one_rank_fails_and_is_healed(times: int, writes: Writes, model: Path, engine: ToyEngine) -> None:
    world = World(model, [engine], on_mismatch="heal")
    world.step(1)
    writes.times = times
    world.trainer.mutate(2, 0.03)
    assert world.channel.publish(1)["sync/healed"] == 1
    world.number = 1
    world.check()
    writes.times = 0
    world.step(3)
    world.close()


def test_an_engine_that_cannot_be_healed_gets_no_requests(two: World) -> None:
    """The others go on; it stays paused under a label that no client expects."""
    two.cfg.sync.on_mismatch = "heal"
    two.step(1)

    async def hook(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) in ("commit", "audit"):
            engine.models[0].one.data += 1

    two.engines[1].before = hook
    two.trainer.mutate(2, 0.03)
    two.channel.publish(1)
    two.number = 1
    assert two.engines[0].holds(two.trainer.now) and not two.engines[0].paused and two.engines[0].label == "run/0/1"
    assert two.engines[1].paused and two.engines[1].label == "run/fenced" and two.fleet.engines() == ["engine 0"]
    two.trainer.mutate(3, 0.03)
    two.channel.publish(2)
    two.number = 2
    assert two.engines[0].holds(two.trainer.now) and two.engines[1].paused
    two.engines[1].before = None
    two.engines[1].crash()
    restart(two, 1)
    two.check()
    two.step(4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), RecursionError(), GeneratorExit()], ids=repr)
def test_nothing_that_is_raised_in_the_loader_gets_out(error: BaseException, writes: Writes, world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    writes.error, writes.times = error, 1  # type: ignore[assignment]
    world.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match=f"rank 1: {type(error).__name__}"):
        world.channel.publish(1)
    world.check(held)
    world.step(3)


# --- 10, 12 -----------------------------------------------------------------------------------------------------------


def test_every_call_that_writes_comes_twice(world: World, writes: Writes) -> None:
    """As when a client sends again what was done."""
    world.step(1)

    async def again(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) in ("commit", "undo"):
            engine.do(path, body)

    for side in ("before", "after"):
        setattr(world.engines[0], side, again)
        world.step(2)
        held = world.trainer.copied()
        writes.times = 1
        world.trainer.mutate(3, 0.03)
        with pytest.raises(NotProven, match=r"no memory|nothing is"):
            world.channel.publish(world.number + 1)
        world.check(held)
        setattr(world.engines[0], side, None)
    assert world.engines[0].calls.count("undo") == 4
    world.step(4)


def test_a_rank_is_given_the_file_of_another(world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    [host] = world.fleet.hosts

    def swapped(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.PREPARE:
            one, two = sorted(host.weights._paths)
            paths = host.weights._paths
            paths[one], paths[two] = paths[two], paths[one]

    host.before = swapped
    world.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match="was made for another live map; learn again"):
        world.channel.publish(1)
    world.check(held)
    host.before = lambda actions: None
    world.step(3)


def test_another_model_is_noticed_at_once(model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({name: tensor for name, tensor in tensors.items() if name != "down"}, tmp_path / "other" / "model.safetensors")
    World(model, [engine]).close()
    save_file(tensors | {"more": torch.zeros(3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=r"cannot follow deltas|serves another model"):
        World(tmp_path / "other", [engine])
    assert not engine.paused


# --- 11, 20, 22 -------------------------------------------------------------------------------------------------------


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
        stage.add(found)
        stage.write(tmp_path / "staged", "run/0/1", "run/0/0")
        [width] = staging.read(tmp_path / "staged", live, fingerprint.run_key("run")).widths
        segments = width.segments(np.zeros(1, np.uint64))
        at = [int(s["address"]) + int(i) for s in segments for i in width.index[int(s["at"]) : int(s["at"] + s["count"])]]
        assert at == positions.tolist() and (width.bits == new).all()
        assert len(segments) == (2 if size > 2**32 else 1)


# --- 13: answers that do not come -------------------------------------------------------------------------------------


def settled(world: World, held: list[Any]) -> str:
    """Where a publication of `trainer.now` has ended: the engine goes on with the version before or with the new one, or it is paused."""
    [engine] = world.engines
    if engine.paused:
        return "paused"
    assert engine.holds(world.trainer.now) or engine.holds(held)
    return "new" if engine.label == f"{world.label}1" and engine.holds(world.trainer.now) else "old"


@pytest.mark.parametrize("side", ["before", "after"])
def test_any_call_of_a_publication_is_lost(side: str, model: Path, engine: ToyEngine) -> None:
    """The n-th one, on its way there or its answer on the way back."""
    ends = []
    world = World(model, [engine])
    for n in range(8):
        world.step(1)
        held = world.trainer.copied()
        count = iter(range(1000))

        async def hook(engine: ToyEngine, path: str, body: dict[str, Any], n: int = n, count: Iterator[int] = count) -> None:
            if next(count) == n:
                raise ConnectionError

        setattr(engine, side, hook)
        world.trainer.mutate(2, 0.03)
        try:
            world.channel.publish(1)
            ends.append("well")
        except NotProven as error:
            assert "engine 0 at http" in str(error) and "was lost during /" in str(error)
            ends.append("not proven")
        setattr(engine, side, None)
        ends[-1] += f", {settled(world, held)}"
        world.close()
        world = World(model, [engine], epoch=n + 1)
        world.check(world.base)
    # what runs is asked again | pause, begin, commit and end are undone | it is told again to go on | there is no further call
    assert ends == ["well, new", *["not proven, old"] * 4, "well, new", "well, new", "well, new"]
    world.step(4)
    world.close()


@pytest.mark.parametrize("do", [Do.PREPARE, Do.COMMIT, Do.UNDO, Do.RESUME, Do.DROP])
def test_an_answer_is_lost_between_agent_and_driver(do: Do, two: World) -> None:
    """It did what it was asked, and nobody knows."""
    two.step(1)
    held = two.trainer.copied()
    failing = {Do.UNDO: Do.COMMIT, Do.DROP: Do.PREPARE}.get(do)
    two.fleet.lost = lambda action: action.engine == "engine 1" and action.do in (do, failing)
    two.trainer.mutate(2, 0.03)
    if do is Do.RESUME:
        two.channel.publish(1)
        two.number, held = 1, two.trainer.copied()
    else:
        with pytest.raises(NotProven, match=r"engine 1: (prepare|commit) failed: the answer was lost"):
            two.channel.publish(1)
    assert two.engines[0].holds(held) and not two.engines[0].paused
    assert two.engines[1].holds(held), "what was asked was done"
    two.fleet.lost = lambda action: False
    two.engines[1].paused = two.engines[1].paused and do is not Do.UNDO  # its agent goes on where the driver has given it up
    two.step(3)


def test_an_agent_ends_while_it_commits(two: World) -> None:
    """Its host is left behind; the other one is brought back, and a new agent takes its place."""
    two.step(1)
    held = two.trainer.copied()

    def ends(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.COMMIT:
            two.fleet.dead.add(1)

    two.fleet.hosts[1].before = ends
    two.trainer.mutate(2, 0.03)
    with pytest.raises(
        NotProven, match="engine 1: commit failed: waiting for engine 1 to commit weights run/0/1: a process died or was lost"
    ):
        two.channel.publish(1)
    assert two.engines[0].holds(held) and not two.engines[0].paused
    with pytest.raises(RuntimeError, match="a process died or was lost"):
        two.channel.publish(1)
    world = World(two.model, two.engines, epoch=1)
    world.check(world.base)
    world.step(3)
    world.close()


@pytest.fixture
def far(model: Path, engine: ToyEngine) -> Iterator[tuple[World, Proxy]]:
    """An engine behind a connection."""
    proxy = Proxy(engine.spec.endpoint.url.removeprefix("http://"))
    engine.spec.endpoint = replace(engine.spec.endpoint, url=proxy.url)
    world = World(model, [engine], timeout_s=1.5)
    yield world, proxy
    world.close()
    proxy.close()


def test_a_slow_engine_is_waited_for(far: tuple[World, Proxy]) -> None:
    world, proxy = far
    world.step(1)
    proxy.rule = lambda data, answer: 0.05
    world.step(2)


@pytest.mark.parametrize("answer", [False, True], ids=["there", "back"])
def test_a_partition_ends_with_the_name_of_the_deadline(answer: bool, far: tuple[World, Proxy], engine: ToyEngine) -> None:
    """From the commit on nothing passes; the commit itself comes, or is answered, when another agent has taken over long since."""
    world, proxy = far
    world.step(1)
    cut: list[float] = []

    def rule(data: bytes, back: bool) -> float | None:
        if b"POST /update_weights_from_tensor" in data:
            cut.append(time.monotonic())
            return 0.0 if answer else 3.0
        return 0.0 if not cut else 3.0 if back and len(cut) == 1 else None

    proxy.rule = rule
    world.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match=r"engine 0: commit failed: waiting for .* after .* s \(sync.timeout_s\); fenced: engine 0"):
        world.channel.publish(1)
    assert engine.paused, "nobody has proven what it holds"
    for host in world.fleet.hosts:
        host.close()
    world.fleet.hosts = []
    direct = SimpleNamespace(spec=SimpleNamespace(endpoint=replace(engine.spec.endpoint, url=f"http://{proxy.target}"), log=Path("log")))
    engine.spec = direct.spec
    again = World(world.model, [engine], epoch=1)
    again.check(again.base)
    again.step(4)
    commits = engine.calls.count("commit")
    while time.monotonic() - cut[0] < 3.3:
        time.sleep(0.1)
    assert engine.calls.count("commit") == commits + (not answer), "it came late, and outside of a session"
    again.check()
    again.close()


def test_a_door_that_breaks_and_one_that_does_not_answer(world: World, tmp_path: Path) -> None:
    """The second rank's, which the agent reaches by a proxy."""
    world.step(1)
    held = world.trainer.copied()
    [host] = world.fleet.hosts
    link = host.live[0]._links[1]
    host.run(link.close())
    proxy = Proxy(link.path, tmp_path / "door")
    link.path = str(tmp_path / "door")
    host.weights._cfg.sync.timeout_s = 1.0
    rules: list[tuple[Callable[[bytes, bool], float | None], str]] = [
        (lambda data, answer: None if b'"stage"' in data else 0.0, "prepare failed: engine 0 rank 1 at .* was lost while it should stage"),
        (
            lambda data, answer: 2.0 if b'"entries"' in data else 0.0,
            r"prepare failed: waiting for engine 0 rank 1 to stage: nothing after 1 s \(sync.timeout_s\)",
        ),
        (lambda data, answer: None if b"commit-" in data else 0.0, "commit failed: engine 0 rank 1 at .* was lost while it should result"),
    ]
    for rule, says in rules:
        proxy.rule = rule
        world.trainer.mutate(2, 0.03)
        with pytest.raises(NotProven, match=says):
            world.channel.publish(1)
        proxy.rule = lambda data, answer: 0.0
        world.check(held)
    world.step(3)
    proxy.close()


# --- 15 ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def little_room(kind: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shared memory of 300 kB, or files of at most as much."""
    if kind == "limit":
        yield
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shared_folder, "SHARED_MEMORY", where)
            yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_no_room_for_a_staged_file(kind: str, model: Path, engine: ToyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the file that did not fit, so that a smaller one fits."""
    with little_room(kind, tmp_path, monkeypatch):
        world = World(model, [engine])
        world.step(1, 0.01)
        held = world.trainer.copied()
        folder = world.fleet.hosts[0].weights._folder
        before = sorted(folder.iterdir())
        world.trainer.now[0][:] = ~world.trainer.now[0]
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with pytest.raises(OSError, match=r"(No space left on device|File too large): a staged file of \d+ bytes: .*staged.partial"):
                world.channel.publish(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        world.check(held)
        assert sorted(folder.iterdir()) == before
        world.trainer.now = [bits.copy() for bits in held]
        world.step(2, 0.01)
        world.close()


def test_what_a_killed_agent_left_in_shared_memory_is_removed(model: Path, engine: ToyEngine) -> None:
    """By the next one on the host; what belongs to one that lives stays."""
    alive = shared_folder.SharedFolder()
    faulty.kill_an_agent(recipe(model, 2), engine.spec.endpoint, "the staged file is there")
    door = engine.inside[0]._door
    assert door is not None
    left = Path(door.path).parent
    assert left.parent == alive.path.parent and list(left.glob("*.staged"))
    world = World(model, [engine], epoch=1)
    assert not left.exists() and alive.path.is_dir()
    world.step(1)
    world.close()
    alive.close()
    assert not alive.path.exists()


def test_the_list_names_tests_that_there_are() -> None:
    """Every test of docs/faults.md, and every number of a case from 1 to 22 in it."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "faults.md").read_text()
    written = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"test_\w+(?!\w*\.py)\b", text)) - {path.stem for path in (root / "tests").rglob("test_*.py")}
    assert len(named) > 50 and not [name for name in named if f"def {name}(" not in written]
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == set(range(1, 23))
