"""Real engines after many deltas: every live bit is that of a full load, and a bit that is not is found and named."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.engine.host_copy import bits_of
from slime.engine.live import LiveEngine
from slime.sync.channel import Channel, NotProven
from slime.sync.diff import Delta, Summary
from slime.sync.livemap import complement
from slime.sync.manifest import PartRef
from slime.sync.publication import Action, Do
from slime.sync.records import ModelSpec
from slime.sync.states import Holds
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.flip_loader import Flipper
from tests.engine.weights_double import RUN_ID, TIMEOUT_S, Bits, Host, bf16_recipe, open_channel
from tests.tiny import make_tiny
from tests.trainer.ranks import Ranks, make_batch, make_cfg, weights
from tests.trainer.test_layouts import LAYOUTS

pytestmark = pytest.mark.e2e
VERSIONS = 200
VOCAB = 77  # which engines pad
HIDDEN = 64
CASES: dict[str, Any] = {
    "dense, tied": ("qwen3", 1, {"tied": True}),
    "dense, TP2": ("qwen3", 2, {}),
    "experts, TP2": ("qwen3_moe", 2, {}),
    "latent": ("deepseek_v3", 1, {}),
}
QUICK = "dense, tied"
FRESH = "experts, TP2"  # compared with a server that starts with the same weights, too
Dump = list[dict[str, np.ndarray]]  # bytes of every storage, for each rank


@dataclass
class Engine:
    """A server of one case, and all that drives it."""

    model: Path
    root: Path
    ranks: int
    host: Host
    weights: Bits
    channel: Channel
    flippers: list[Flipper]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def live(self) -> LiveEngine:
        return self.host.live[0]

    def dump(self) -> Dump:
        """Of the storages that are followed."""
        followed = [{found.lives[i].name for i in {m.live for m in found.moves} | set(found.foreign)} for found in self.live.maps]
        dumps = [flipper.dump() for flipper in self.flippers]
        return [{name: dump[name] for name in names} for names, dump in zip(followed, dumps, strict=True)]

    def scramble(self) -> None:
        """Give every byte that comes from an HF tensor another value."""
        for found, flipper in zip(self.live.maps, self.flippers, strict=True):
            for number in {move.live for move in found.moves}:
                live = found.lives[number]
                none = np.array(found.foreign.get(number, ()), np.int64).reshape(-1, 2)
                for start, end in complement(live.size, none[:, 0], none[:, 1])[0]:
                    flipper.scramble(live.name, start * live.width, end * live.width)

    def load_whole(self) -> None:
        """All tensors through stock SGLang's own update."""

        async def do() -> None:
            await self.live.pause("in_place", TIMEOUT_S)
            label = self.host.weights.copy.label
            await self.live.load_whole(self.weights.weights(WeightVersion(0, 0), 1 << 16), label, TIMEOUT_S)
            await self.live.resume()

        self.host.run(do())


def start(stack: ExitStack, root: Path, case: str) -> Engine:
    family, ranks, settings = CASES[case]
    model = make_tiny(root / "model", family, dtype="bf16", vocab=VOCAB, **settings)
    cfg = bf16_recipe(model, ranks)
    cfg.sync.pause = "in_place"  # nothing runs: the cheapest
    server = servers.start(cfg, root / "engine.log")
    stack.callback(server.stop)
    host = stack.enter_context(Host(cfg, [server]))
    bits = Bits(model)
    channel = open_channel(cfg, bits, host)
    return Engine(model, root, ranks, host, bits, channel, host.flippers(root)[0])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("engine"), QUICK)


def differing(a: Dump, b: Dump) -> dict[str, int]:
    """How many bits differ between two dumps of the same storages; storages that do not differ are left out."""
    assert [x.keys() for x in a] == [y.keys() for y in b]
    found = {
        f"{name} of rank {rank}": int(np.bitwise_count(x[name] ^ y[name]).sum())
        for rank, (x, y) in enumerate(zip(a, b, strict=True))
        for name in sorted(x)
    }
    return {name: count for name, count in found.items() if count}


def bits_in(dump: Dump) -> int:
    return sum(8 * storage.size for of_rank in dump for storage in of_rank.values())


def publish_many(engine: Engine, versions: int) -> int:
    """Versions in a row, each of which changes 0.1 to 40 % of the elements; of ten, one changes nothing and one goes back to the version
    before the last. Returns how many elements changed."""
    g = np.random.default_rng(7)
    changed, back = 0, engine.weights.copied()
    for turn in range(versions):
        before = engine.weights.copied()
        match turn % 10:
            case 0:
                pass
            case 9:
                engine.weights.now = back
            case _:
                engine.weights.mutate(turn, float(np.exp(g.uniform(np.log(1e-3), np.log(0.4)))))
        back = before
        metrics = engine.channel.publish(next(engine.numbers))
        changed += round(metrics["sync/density"] * sum(tensor.size for tensor in engine.weights.spec().tensors))
        assert (turn % 10 == 0) == (metrics["sync/density"] == 0)
    return changed


def check_many(engine: Engine, record_property: Any) -> Dump:
    """The engine after VERSIONS deltas, against a load of everything into scrambled memory."""
    loaded = engine.dump()
    changed = publish_many(engine, VERSIONS)
    by_deltas = engine.dump()
    assert differing(loaded, by_deltas)
    engine.scramble()
    assert sum(differing(by_deltas, engine.dump()).values()) > 3.9 * engine.weights.spec().nbytes, "four bits of every byte"
    engine.load_whole()
    assert differing(by_deltas, engine.dump()) == {}, "deltas do not lead to the bits of a full load"
    record_property("bits compared", bits_in(by_deltas))
    record_property("elements changed", changed)
    return by_deltas


def test_many_deltas_give_the_bits_of_a_full_load(engine: Engine, record_property: Any) -> None:
    check_many(engine, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != QUICK])
def test_many_deltas_in_other_engines(case: str, tmp_path: Path, record_property: Any) -> None:
    with ExitStack() as stack:
        engine = start(stack, tmp_path, case)
        by_deltas = check_many(engine, record_property)
        assert flip_many(engine, 30, 3) == 30
        if case != FRESH:
            return
        exported = engine.weights.export(tmp_path / "exported", engine.model)
    cfg = bf16_recipe(exported, engine.ranks)
    with ExitStack() as stack:
        server = servers.start(cfg, tmp_path / "fresh.log")
        stack.callback(server.stop)
        host = stack.enter_context(Host(cfg, [server]))
        open_channel(cfg, Bits(exported), host)
        fresh = Engine(exported, tmp_path, engine.ranks, host, engine.weights, engine.channel, host.flippers(tmp_path)[0])
        assert differing(by_deltas, fresh.dump()) == {}, "a server that starts with these weights has other bits"


# --- one bit ----------------------------------------------------------------------------------------------------------


def owner(engine: Engine, rank: int, name: str, byte: int) -> str:
    """Whose element lies there: an HF tensor, or the storage itself where it has no source."""
    found = engine.live.maps[rank]
    number = next(i for i, live in enumerate(found.lives) if live.name == name)
    element = byte // found.lives[number].width
    for move in found.moves:
        if move.live == number and (move.target.at(np.arange(move.target.size)) == element).any():
            return engine.weights.spec().tensors[move.tensor].name
    return name


def owner_by_layers(name: str, byte: int) -> str:
    """The same of an undivided engine without experts, by what SGLang's layers are. `byte` in a storage of bfloat16."""
    row = byte // 2 // HIDDEN
    fused = {"qkv_proj": [("q_proj", 64), ("k_proj", 32), ("v_proj", 32)], "gate_up_proj": [("gate_proj", 96), ("up_proj", 96)]}
    for layer, parts in fused.items():
        if layer in name:
            ends = np.cumsum([rows for _, rows in parts])
            return name.replace(layer, parts[int(np.searchsorted(ends, row, "right"))][0])
    return name


def flip_many(engine: Engine, flips: int, seed: int) -> int:
    """Flip one bit of the engine before a publication that changes nothing, and flip it back before what follows from it; how many were
    caught, named, and undone."""
    g = np.random.default_rng(seed)
    dump, caught = engine.dump(), 0
    for _ in range(flips):
        rank = int(g.integers(engine.ranks))
        name = str(g.choice(sorted(dump[rank])))
        flip(engine, rank, name, int(g.integers(dump[rank][name].size)), int(g.integers(8)))
        caught += 1
    assert differing(dump, engine.dump()) == {}
    return caught


def flip(engine: Engine, rank: int, name: str, byte: int, bit: int) -> None:
    """A flipped bit is caught at the next publication and its tensor named, and the engine holds what it held."""

    def mend(actions: Sequence[Action]) -> None:
        if any(action.do is Do.UNDO for action in actions):
            engine.flippers[rank].flip(name, byte, bit)

    before, whose = engine.host.weights.copy.label, owner(engine, rank, name, byte)
    engine.flippers[rank].flip(name, byte, bit)
    engine.host.before = mend
    with pytest.raises(NotProven) as caught:
        engine.channel.publish(next(engine.numbers))
    engine.host.before = lambda actions: None
    state = engine.live.state
    assert state is not None and isinstance(state.state, Holds) and state.state.held.label == before
    assert f" {whose} " in str(caught.value).replace(",", " "), (
        f"{whose}, bit {bit} of byte {byte} of {name} in rank {rank}: {caught.value}"
    )


def test_a_flipped_bit_is_caught_and_its_tensor_named(engine: Engine) -> None:
    assert flip_many(engine, 40, 1) == 40
    g = np.random.default_rng(0)
    for name, storage in engine.dump()[0].items():
        for byte in g.integers(min(storage.size, 2 * VOCAB * HIDDEN), size=8).tolist():
            assert owner(engine, 0, name, byte) == owner_by_layers(name, byte)
    padding = engine.dump()[0]["model.embed_tokens.weight"].size - 1
    assert padding > 2 * VOCAB * HIDDEN, "the vocabulary is padded"
    cache = next(name for name in engine.dump()[0] if name.endswith("cos_sin_cache"))
    for name, byte in (("model.embed_tokens.weight", padding), (cache, 1001)):
        flip(engine, 0, name, byte, 3)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_caught(engine: Engine) -> None:
    assert flip_many(engine, 1000, 2) == 1000


# --- a real trainer -----------------------------------------------------------------------------------------------------

ROUNDS = 20
TRAINERS = {
    "dense": ("qwen3", {"tied": True, "vocab": 20_000}, ["TP2", "DP2", "PP2"]),
    "experts": ("qwen3_moe", {"vocab": VOCAB}, ["EP2", "TP2 x EP2 x ETP1"]),
}


class Recorded:
    """A publisher of what ranks have encoded: for every version the parts, in their order, and the summary."""

    def __init__(self, spec: ModelSpec, versions: list[tuple[list[bytes], Summary]]) -> None:
        self._spec, self._versions = spec, versions

    def spec(self) -> ModelSpec:
        return self._spec

    def take_base(self, run_id: str) -> Sequence[int]:
        return ()  # the ranks have

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        payloads, summary = self._versions[version.number]
        return Delta(payloads, tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads)), summary)  # type: ignore[arg-type]

    def acknowledge(self, version: WeightVersion) -> None:
        pass


def train_and_publish(place: Any, cfg: Any, part_bytes: int) -> tuple[ModelSpec, list[Any], dict[str, Any]]:
    """On a rank: ROUNDS publications, most after an optimizer step, and the weights at the end."""
    from slime.trainer import publish, step

    trainer = place.trainer(cfg)
    snapshot = publish.take_base(trainer.model, trainer.parallel, RUN_ID)
    found = []
    for number in range(ROUNDS):
        if number % 7:
            step.train_batch(trainer, make_batch(vocab=VOCAB, seed=number))
        found.append(publish.encode(snapshot, trainer, "steps", part_bytes))
        publish.acknowledge(snapshot, trainer)
    return snapshot.spec, found, weights(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_deltas_of_real_ranks_give_the_bits_of_what_they_export(kind: str, tmp_path: Path, record_property: Any) -> None:
    family, settings, layouts = TRAINERS[kind]
    model = make_tiny(tmp_path / "model", family, dtype="bf16", **settings)
    cfg = bf16_recipe(model)
    cfg.sync.pause, cfg.sync.bucket_mb = "in_place", 1
    pool = Ranks(tmp_path)
    with ExitStack() as stack:
        stack.callback(pool.close)
        server = servers.start(cfg, tmp_path / "engine.log")
        stack.callback(server.stop)
        for layout in layouts:
            world, knobs = LAYOUTS[layout]
            ranks = pool.run(train_and_publish, world, make_cfg(model, "bf16", lr=1e-4, **knobs), 1 << 20)
            spec, exported = ranks[0][0], ranks[0][2]
            rounds = [sorted(part for of_rank in ranks for part in of_rank[1][number][0]) for number in range(ROUNDS)]
            versions = [([payload for _, payload in parts], ranks[0][1][number][1]) for number, parts in enumerate(rounds)]
            with Host(cfg, [server]) as host:  # which brings the engine back to the model directory first
                bits = Bits(model)
                engine = Engine(
                    model, tmp_path, 1, host, bits, open_channel(cfg, Recorded(spec, versions), host), host.flippers(tmp_path)[0]
                )
                changed = [engine.channel.publish(number)["sync/density"] > 0 for number in range(ROUNDS)]
                assert changed == [number % 7 > 0 for number in range(ROUNDS)]
                by_deltas = engine.dump()
                bits.now = [bits_of(exported[tensor.name]).copy() for tensor in bits.spec().tensors]
                engine.scramble()
                engine.load_whole()
                assert differing(by_deltas, engine.dump()) == {}, layout
                record_property(f"{layout}: bits compared", bits_in(by_deltas))
