"""The in-server part in real SGLang servers: learn, stage while it serves, commit, undo, load, audit; and what must be refused."""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.engine.agent import open_session
from slime.engine.control import Control
from slime.engine.server import Server
from slime.sync import buckets, fingerprint
from slime.sync.inserver_client import RankClient, RankError, RankReply, command
from slime.sync.inserver_lives import _tensors
from slime.sync.livemap import LiveMap
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.staging import Stage
from tests.engine import servers
from tests.tiny import make_tiny

LOADER, PROBE = "slime.sync.inserver.load", "tests.engine.test_inserver.probe"
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BF16 = [0x7FC1, 0xFF83, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x807F, 0x0080, 0xFFFF]  # NaNs, infinities, zeros, subnormals


def probe(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A weight loader that dumps all that the model holds, or flips bits of it behind the channel's back."""
    fields = json.loads(next(iter(named_tensors))[0])
    rank = torch.distributed.get_rank()
    if fields["op"] == "dump":
        arrays = {name: tensor.contiguous().view(BITS[tensor.element_size()]).numpy() for name, tensor, *_ in _tensors(model)}
        np.savez(f"{fields['path']}.{rank}.npz", **arrays)
    if fields["op"] == "flip" and rank == fields["rank"]:
        tensor = next(tensor for name, tensor, *_ in _tensors(model) if name == fields["name"])
        tensor.view(-1).view(BITS[tensor.element_size()])[fields["element"]] ^= 1


@dataclass
class Engine:
    """A server, its doors, and the HF tensors that it should hold."""

    server: Server
    ranks: int
    root: Path
    spec: ModelSpec
    hf: dict[str, torch.Tensor]
    maps: list[LiveMap] = field(default_factory=list)
    calls: int = 0

    @property
    def socket(self) -> str:
        return str(self.root / "door")

    def send(self, names: list[str], loader: str = LOADER) -> None:
        """Weight updates of empty tensors, as the host agent does them."""

        async def do() -> None:
            async with open_session() as session:
                control = Control(self.server.spec.endpoint, session)
                await control.pause("retract")
                await control.begin()
                for name in names:
                    payload = buckets.serialise([(name, torch.empty(0))])
                    await control.update([payload] * self.ranks, None, False, 60, loader)
                await control.end()
                await control.resume()

        asyncio.run(do())

    def door(self, do: Callable[[RankClient], Any]) -> list[Any]:
        """The same call at every rank's door."""

        async def each() -> list[Any]:
            clients = [RankClient(f"{self.socket}.{rank}", f"rank {rank}") for rank in range(self.ranks)]
            try:
                return await asyncio.gather(*(do(client) for client in clients))
            finally:
                for client in clients:
                    await client.close()

        return asyncio.run(each())

    def run(self, op: str, **fields: Any) -> list[RankReply]:
        self.calls += 1
        name = f"{op} {self.calls}"
        self.send([command(op, id=name, **fields)])
        return self.door(lambda client: client.result(name))

    def learn(self, **fields: Any) -> list[RankReply]:
        path = self.root / "model.json"
        path.write_text(self.spec.to_json())
        replies = self.run("learn", socket=self.socket, spec=str(path), run_id="run", **fields)
        self.maps = [described.map for described in self.door(lambda client: client.describe())]
        return replies

    def stage(self, changes: list[Changes], version: str, parent: str) -> list[RankReply]:
        for rank, found in enumerate(self.maps):
            stage = Stage(found, fingerprint.run_key("run"))
            for each in changes:
                stage.add(stage.pieces(each))
            stage.write(self.root / f"staged.{rank}", version, parent)
        return self.restage(version, parent)

    def restage(self, version: str, parent: str) -> list[RankReply]:
        return self.door(lambda client: client.stage(f"{self.root}/staged.{client.name.split()[1]}", version, parent, 60))

    def load(self, hf: dict[str, torch.Tensor], **fields: Any) -> list[RankReply]:
        save_file({name: tensor.contiguous() for name, tensor in hf.items()}, self.root / "load.safetensors")
        return self.run("load", path=str(self.root / "load.safetensors"), **fields)

    def dump(self) -> list[dict[str, np.ndarray]]:
        self.send([json.dumps({"op": "dump", "path": str(self.root / "dump")})], PROBE)
        return [dict(np.load(self.root / f"dump.{rank}.npz")) for rank in range(self.ranks)]

    def flip(self, name: str, element: int, rank: int = 0) -> None:
        self.send([json.dumps({"op": "flip", "name": name, "element": element, "rank": rank})], PROBE)

    def opaque(self) -> set[str]:
        return {name for found in self.maps for name in found.opaque}

    def opaque_file(self, hf: dict[str, torch.Tensor]) -> str | None:
        """A file of the opaque tensors, if there are any."""
        if not self.opaque():
            return None
        save_file({name: hf[name] for name in self.opaque()}, self.root / "opaque.safetensors")
        return str(self.root / "opaque.safetensors")

    def wrong(self, replies: list[RankReply], hf: dict[str, torch.Tensor]) -> list[str]:
        """Tensors whose audit does not give the fingerprint of `hf`."""
        key = fingerprint.run_key("run")
        table = fingerprint.table(key)
        wrong = []
        for number, tensor in enumerate(self.spec.tensors):
            if tensor.name in self.opaque():
                continue
            sums: dict[Any, int] = {}
            for found, reply in zip(self.maps, replies, strict=True):
                for move in found.of_tensor.get(number, ()):
                    value = sums.setdefault(found.moves[move].source, reply.moves[move])
                    if value != reply.moves[move]:
                        wrong.append(tensor.name)
            full = fingerprint.full(bits(hf[tensor.name]), fingerprint.tensor_key(key, tensor.name), table)
            if sum(sums.values()) % 2**64 != full:
                wrong.append(tensor.name)
        return wrong


def bits(tensor: torch.Tensor) -> np.ndarray:
    found = tensor.contiguous().view(BITS[tensor.element_size()]).numpy().reshape(-1)
    return found.view(f"u{found.itemsize}")


def changed(spec: ModelSpec, hf: dict[str, torch.Tensor], seed: int) -> tuple[dict[str, torch.Tensor], list[Changes]]:
    """Some elements of every tensor with any bits, special ones among them; all elements of a few."""
    random = np.random.default_rng(seed)
    after, changes = {}, []
    for number, tensor in enumerate(spec.tensors):
        old = bits(hf[tensor.name])
        new = old.copy()
        share = 1.0 if number % 5 == seed % 5 else 0.05
        positions = np.flatnonzero(random.random(len(old)) < share)
        drawn = random.integers(0, 256, len(positions) * old.itemsize, dtype=np.uint8).view(old.dtype)
        if tensor.dtype == "bfloat16":
            special = random.random(len(positions)) < 0.3
            drawn[special] = random.choice(np.array(BF16, np.uint16), special.sum())
        new[positions] = drawn
        after[tensor.name] = torch.from_numpy(new.view(f"i{old.itemsize}")).view(getattr(torch, tensor.dtype)).view(tensor.shape)
        changes.append(Changes(number, positions, old[positions], drawn))
    return after, changes


def back(changes: list[Changes]) -> list[Changes]:
    return [Changes(each.tensor, each.positions, each.new, each.old) for each in changes]


def same(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return all(x.keys() == y.keys() and all((x[name] == y[name]).all() for name in x) for x, y in zip(a, b, strict=True))


def start(root: Path, family: str, ranks: int, **model: Any) -> Engine:
    path = make_tiny(root / "model", family, dtype="bf16", **model)
    cfg = servers.recipe(path, tensor_parallel=ranks, sglang={"custom_weight_loader": [PROBE]})
    cfg.model.dtype = "bf16"
    hf = load_file(path / "model.safetensors")
    spec = ModelSpec(tuple(TensorSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in hf.items()))
    return Engine(servers.start(cfg, root / "engine.log"), ranks, root, spec, hf)


CASES: dict[str, Any] = {
    "untied": ("qwen3", 1, {}),
    "two ranks": ("qwen3", 2, {"tied": True}),
    "experts": ("qwen3_moe", 2, {}),
    "latent": ("deepseek_v3", 1, {}),
    "latent, two ranks": ("deepseek_v3", 2, {}),
}


@pytest.mark.e2e
def test_a_delta_gives_the_bits_of_a_full_load(engine: Engine) -> None:
    check_bits(engine)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_delta_gives_the_bits_of_a_full_load_in_other_models_and_layouts(case: str, tmp_path: Path) -> None:
    family, ranks, model = CASES[case]
    engine = start(tmp_path, family, ranks, **model)
    try:
        check_bits(engine)
    finally:
        engine.server.stop()


def check_bits(engine: Engine) -> None:
    spec, loaded = engine.spec, engine.dump()
    for reply in engine.learn(held="run/0/0"):
        assert reply.ok and not reply.changed, reply
    assert same(loaded, engine.dump()), "learning wrote to the weights"
    assert not engine.wrong(engine.run("audit"), engine.hf)
    held = {spec.tensors[number].name for found in engine.maps for number in found.of_tensor}
    assert held | engine.opaque() == set(spec.index), "every tensor goes somewhere"

    first, changes = changed(spec, engine.hf, 1)
    assert all(reply.entries for reply in engine.stage(changes, "run/0/1", "run/0/0"))
    assert same(loaded, engine.dump()), "staging wrote to the weights"
    replies = engine.run("commit", version="run/0/1", parent="run/0/0", load=engine.opaque_file(first))
    assert all(reply.ok and reply.held == "run/0/1" and not reply.changed for reply in replies), replies
    assert not engine.wrong(replies, first)
    differ = {name for name in spec.index if (bits(first[name]) != bits(engine.hf[name])).any()}
    assert set(engine.wrong(replies, engine.hf)) == differ - engine.opaque() != set()

    again = engine.run("commit", version="run/0/1", parent="run/0/0")
    assert [reply.moves for reply in again] == [reply.moves for reply in replies]

    replies = engine.run("undo", version="run/0/1", load=engine.opaque_file(engine.hf))
    assert all(reply.ok and reply.held == "run/0/0" and not reply.changed for reply in replies), replies
    assert not engine.wrong(replies, engine.hf) and same(loaded, engine.dump())

    engine.restage("run/0/1", "run/0/0")
    engine.run("commit", version="run/0/1", parent="run/0/0")
    second, more = changed(spec, first, 2)
    engine.stage(more, "run/0/2", "run/0/1")
    replies = engine.run("commit", version="run/0/2", parent="run/0/1", load=engine.opaque_file(second))
    assert all(reply.ok and reply.held == "run/0/2" and not reply.changed for reply in replies), replies
    assert not engine.wrong(replies, second)
    by_delta = engine.dump()
    replies = engine.load(second, version="run/0/2")
    assert all(reply.ok and not reply.changed for reply in replies) and not engine.wrong(replies, second)
    assert same(by_delta, engine.dump()), "a delta does not give what load_weights gives"
    assert not same(loaded, by_delta)
    engine.load(engine.hf)
    assert same(loaded, engine.dump())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = start(tmp_path_factory.mktemp("engine"), "qwen3", 1, tied=True)
    yield made
    made.server.stop()


@pytest.fixture
def fresh(engine: Engine) -> Engine:
    """At run/0/0, with nothing staged."""
    if engine.maps:
        engine.load(engine.hf)
    engine.learn(held="run/0/0")
    return engine


@pytest.mark.e2e
def test_it_stages_while_it_generates(fresh: Engine) -> None:
    _, changes = changed(fresh.spec, fresh.hf, 1)
    fresh.stage(changes, "run/0/1", "run/0/0")
    request = ([7, 8, 9], servers.Endless(max_new_tokens=48, temperature=0.0))
    [expected] = servers.ask(fresh.server, [request])
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(servers.ask, fresh.server, [request] * 4)
        staged = 0
        while not asked.done():
            assert fresh.restage("run/0/1", "run/0/0")[0].ok
            staged += 1
    assert staged and all(answer.output_ids == expected.output_ids for answer in asked.result())


@pytest.mark.e2e
def test_another_base_is_refused_before_anything_is_written(fresh: Engine) -> None:
    _, changes = changed(fresh.spec, fresh.hf, 1)
    before = fresh.dump()
    fresh.flip("model.layers.1.mlp.down_proj.weight", 17)
    number = fresh.spec.index["model.layers.1.mlp.down_proj.weight"]
    flipped = Changes(
        number, np.array([17]), changes[number].old[:1] * 0 + bits(fresh.hf[fresh.spec.tensors[number].name])[17], np.array([9], "u2")
    )
    with pytest.raises(RankError, match="the live weights are not run/0/0"):
        fresh.stage([flipped], "run/0/1", "run/0/0")
    [reply] = fresh.run("commit", version="run/0/1", parent="run/0/0")
    assert not reply.ok and "not staged" in str(reply.error) and reply.held == "run/0/0"
    fresh.flip("model.layers.1.mlp.down_proj.weight", 17)
    assert same(before, fresh.dump())
    fresh.stage([flipped], "run/0/1", "run/0/0")


@pytest.mark.e2e
def test_flipped_bits_are_caught_and_named(fresh: Engine) -> None:
    for name, hf in (
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
    ):
        element = 64 * 64 + 5 if "qkv" in name else 5  # the first rows are q's
        fresh.flip(name, element)
        assert fresh.wrong(fresh.run("audit"), fresh.hf) == [hf]
        fresh.flip(name, element)
    padding = next(found for live, found in zip(fresh.maps[0].lives, range(99), strict=False) if live.name == "model.embed_tokens.weight")
    [(start, _)] = fresh.maps[0].foreign[padding]
    fresh.flip("model.embed_tokens.weight", start + 3)
    replies = fresh.run("audit")
    assert replies[0].changed == ("model.embed_tokens.weight",) and not fresh.wrong(replies, fresh.hf)
    fresh.flip("model.embed_tokens.weight", start + 3)
    assert not fresh.run("audit")[0].changed


@pytest.mark.e2e
def test_commands_that_do_not_fit_are_refused(fresh: Engine) -> None:
    before = fresh.dump()
    _, changes = changed(fresh.spec, fresh.hf, 1)
    for version, parent, staged_as in (("run/0/1", "run/0/7", "run/0/7"), ("run/0/2", "run/0/0", "run/0/0")):
        for rank in range(fresh.ranks):
            Stage(fresh.maps[rank], fingerprint.run_key("run")).write(fresh.root / f"staged.{rank}", "run/0/1", staged_as)
        with pytest.raises(RankError, match="refused to stage"):
            fresh.restage(version, parent)
    fresh.stage(changes, "run/0/1", "run/0/0")
    for fields in (
        {"version": "run/0/1", "parent": "run/0/7"},
        {"version": "run/0/2", "parent": "run/0/0"},
        {"version": "run/0/1"},
        {"version": 7},
    ):
        assert not fresh.run("commit", **fields)[0].ok
    assert not fresh.run("dance")[0].ok
    assert fresh.run("undo", version="run/0/1")[0].ok, "it was not begun: nothing to do"
    assert not fresh.load({"model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)})[0].ok
    assert not fresh.load({"no.such.tensor": torch.zeros(3)})[0].ok
    assert not fresh.run("load", path="/nowhere")[0].ok
    assert not fresh.run("learn", socket=fresh.socket, spec="/nowhere", run_id="run")[0].ok
    fresh.learn()
    fresh.stage(changes, "run/0/1", "run/0/0")
    fresh.door(lambda client: client.drop("run/0/1"))
    assert not fresh.run("commit", version="run/0/1", parent="run/0/0")[0].ok
    assert same(before, fresh.dump())
    fresh.stage(changes, "run/0/1", "run/0/0")
    assert fresh.run("commit", version="run/0/1", parent="run/0/0")[0].ok
    fresh.door(lambda client: client.drop("run/0/1"))
    [reply] = fresh.run("undo", version="run/0/1")
    assert not reply.ok and "was dropped" in str(reply.error) and reply.held == "run/0/1"


@pytest.mark.e2e
def test_garbage_leaves_the_server_alive_and_the_weights_as_they_were(fresh: Engine) -> None:
    before = fresh.dump()
    fresh.send(["", "{", "[]", '{"op": 7}', '{"op": "commit"}', "model.norm.weight", "{" * 5000, '{"op": "learn"}'])
    _, changes = changed(fresh.spec, fresh.hf, 1)
    fresh.stage(changes, "run/0/1", "run/0/0")
    good = (fresh.root / "staged.0").read_bytes()
    random = np.random.default_rng(0)
    for data in (b"", b"\0" * 100, good[:-200], random.bytes(4096), good[:600] + random.bytes(len(good) - 600)):
        (fresh.root / "staged.0").write_bytes(data)
        with pytest.raises(RankError, match="refused to stage"):
            fresh.restage("run/0/1", "run/0/0")

    async def talk() -> None:
        patient = RankClient(f"{fresh.socket}.0", "rank 0")
        await patient.describe()
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, b"\x02\0\0\0[]", b"\x03\0\0\0{{{", b"\x05\0\0\0{}", b""):
            reader, writer = await asyncio.open_unix_connection(f"{fresh.socket}.0")
            writer.write(data)
            await writer.drain()
            if data.endswith(b"{}") and data:
                continue  # half a message, and the connection stays: it must hold up nobody
            if data:
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        for message in (
            {},
            {"op": "describe", "model": 9},
            {"op": "describe", "model": "x"},
            {"op": "result"},
            {"op": "stage"},
            {"op": ["x"]},
        ):
            assert not (await patient._exchange(message))["ok"]
        with pytest.raises(RankError, match=r"rank 9 at .* was lost"):
            await RankClient(f"{fresh.socket}.9", "rank 9").describe()
        assert not (await patient.result("never")).ok
        await patient.close()

    asyncio.run(talk())
    assert same(before, fresh.dump())
    assert os.stat(f"{fresh.socket}.0").st_mode & 0o777 == 0o600


@pytest.mark.e2e
def test_a_new_host_agent_takes_over(fresh: Engine) -> None:
    """It learns again: at the same door, at one whose file has gone, at another; the weights are what they were."""
    first, changes = changed(fresh.spec, fresh.hf, 1)
    fresh.stage(changes, "run/0/1", "run/0/0")
    assert fresh.run("commit", version="run/0/1", parent="run/0/0")[0].ok
    signature = fresh.maps[0].signature
    for change in ("nothing", "gone", "another"):
        if change == "gone":
            os.unlink(f"{fresh.socket}.0")
        if change == "another":
            fresh.root = fresh.root / "moved"
            fresh.root.mkdir()
        [reply] = fresh.learn()
        assert reply.ok and reply.held is None and fresh.maps[0].signature == signature
        assert not fresh.wrong([reply], first)
    second, more = changed(fresh.spec, first, 2)
    fresh.stage(more, "run/0/2", "run/0/1")
    [reply] = fresh.run("commit", version="run/0/2", parent="run/0/1")
    assert reply.ok and not fresh.wrong([reply], second)
