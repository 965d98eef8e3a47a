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
from slime.sync.diff import Delta
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
HEAD_DIM, Q_HEADS, KV_HEADS, HIDDEN, INTERMEDIATE, EXPERT = 16, 4, 2, 64, 96, 24
CASES: dict[str, Any] = {
    "dense, tied": ("qwen3", 1, {"tied": True}),
    "dense, untied, TP2": ("qwen3", 2, {}),
    "experts, tied": ("qwen3_moe", 1, {"tied": True}),
    "experts, untied, TP2": ("qwen3_moe", 2, {}),
}
QUICK = "dense, tied"
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
            await self.live.load_whole(self.weights.weights(WeightVersion(0, 0), 1 << 16), label, True, TIMEOUT_S)
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


def differing(a: Dump, b: Dump) -> int:
    """Bits that differ between two dumps of the same storages."""
    assert [list(x) for x in a] == [list(y) for y in b]
    return sum(int(np.bitwise_count(x[name] ^ y[name]).sum()) for x, y in zip(a, b, strict=True) for name in x)


def bits_in(dump: Dump) -> int:
    return sum(8 * storage.size for of_rank in dump for storage in of_rank.values())


def publish_many(engine: Engine, versions: int) -> int:
    """Versions in a row: 0.1 to 40 % of the elements, from every tenth on nothing, then there and back. Returns how many elements changed."""
    g = np.random.default_rng(7)
    changed = 0
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
    assert differing(by_deltas, engine.dump()) > 0.4 * sum(8 * tensor.nbytes for tensor in engine.weights.spec().tensors)
    engine.load_whole()
    assert differing(by_deltas, engine.dump()) == 0, "deltas do not lead to the bits of a full load"
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
        assert flip_many(engine, 60, 3) == 60
        exported = engine.weights.export(tmp_path / "exported", engine.model)
    cfg = bf16_recipe(exported, engine.ranks)
    with ExitStack() as stack:
        server = servers.start(cfg, tmp_path / "fresh.log")
        stack.callback(server.stop)
        host = stack.enter_context(Host(cfg, [server]))
        open_channel(cfg, Bits(exported), host)
        fresh = Engine(exported, tmp_path, engine.ranks, host, engine.weights, engine.channel, host.flippers(tmp_path)[0])
        assert differing(by_deltas, fresh.dump()) == 0, "a server that starts with these weights has other bits"


# --- one bit ----------------------------------------------------------------------------------------------------------


def owner(name: str, byte: int, ranks: int, vocab: int) -> str:
    """Whose element lies there, by what SGLang's layers are: an HF tensor, or the storage itself where it has no source. `byte` within the
    rank's storage of bfloat16."""
    row = byte // 2 // HIDDEN
    if name.endswith("qkv_proj.weight"):
        heads = [Q_HEADS // ranks, KV_HEADS // ranks, KV_HEADS // ranks]
        return name.replace("qkv_proj", ("q_proj", "k_proj", "v_proj")[_part(row, [n * HEAD_DIM for n in heads])])
    if name.endswith("gate_up_proj.weight"):
        return name.replace("gate_up_proj", ("gate_proj", "up_proj")[_part(row, [INTERMEDIATE // ranks] * 2)])
    if name.endswith("experts.w13_weight"):
        rows = EXPERT // ranks
        projection = ("gate_proj", "up_proj")[_part(row % (2 * rows), [rows, rows])]
        return name.replace("w13_weight", f"{row // (2 * rows)}.{projection}.weight")
    if name.endswith("experts.w2_weight"):
        return name.replace("w2_weight", f"{byte // 2 // (HIDDEN * EXPERT // ranks)}.down_proj.weight")
    return name


def _part(row: int, sizes: Sequence[int]) -> int:
    return int(np.searchsorted(np.cumsum(sizes), row, "right"))


def flip_many(engine: Engine, flips: int, seed: int) -> int:
    """Flip one bit of the engine before a publication that changes nothing, and flip it back before what follows from it; how many were
    caught, named, and undone."""
    g = np.random.default_rng(seed)
    dump, caught = engine.dump(), 0
    for _ in range(flips):
        rank = int(g.integers(engine.ranks))
        name = str(g.choice(sorted(dump[rank])))
        byte, bit = int(g.integers(dump[rank][name].size)), int(g.integers(8))
        caught += flip(engine, rank, name, byte, bit)
    assert differing(dump, engine.dump()) == 0
    return caught


def flip(engine: Engine, rank: int, name: str, byte: int, bit: int) -> bool:
    """Whether a flipped bit is caught at the next publication, and its tensor named."""

    def mend(actions: Sequence[Action]) -> None:
        if any(action.do is Do.UNDO for action in actions):
            engine.flippers[rank].flip(name, byte, bit)

    before = engine.host.weights.copy.label
    engine.flippers[rank].flip(name, byte, bit)
    engine.host.before = mend
    with pytest.raises(NotProven) as caught:
        engine.channel.publish(next(engine.numbers))
    engine.host.before = lambda actions: None
    state = engine.live.state
    assert state is not None and isinstance(state.state, Holds) and state.state.held.label == before
    return f" {owner(name, byte, engine.ranks, VOCAB)} " in str(caught.value).replace(",", " ")


def test_a_flipped_bit_is_caught_and_its_tensor_named(engine: Engine) -> None:
    assert flip_many(engine, 40, 1) == 40
    padding = engine.dump()[0]["model.embed_tokens.weight"].size - 1
    assert padding > 2 * VOCAB * HIDDEN, "the vocabulary is padded"
    cache = next(name for name in engine.dump()[0] if name.endswith("cos_sin_cache"))
    for name, byte in (("model.embed_tokens.weight", padding), (cache, 1001)):
        assert flip(engine, 0, name, byte, 3)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_caught(engine: Engine) -> None:
    assert flip_many(engine, 1000, 2) == 1000
