"""Faults of the weight channel in real SGLang servers; docs/faults.md has the list, tests/sync/test_faults_*.py the cases that need none.

Every one ends with live memory that is, byte for byte, what SGLang's own load of a committed version leaves, or with a named error.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.config import SlimeConfig
from slime.engine.client import EngineClient, Generation
from slime.engine.control import Control
from slime.engine.live import LiveEngine
from slime.engine.server import Server
from slime.sync import buckets
from slime.sync.channel import Channel, NotProven
from slime.sync.publication import Action, Do
from tests.engine import fault_loader, flip_loader, servers
from tests.engine.weights_double import Bits, Host, Tensors
from tests.sync import faulty
from tests.sync.faulty import Fleet, open_channel
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
TIMEOUT_S = 60.0
LOADERS = [flip_loader.LOADER, fault_loader.LOADER]
QUICK = ("the staged file is there", "the commit is sent", "written", "the host copy follows")


def recipe(model: Path, ranks: int, dtype: str = "bf16", deterministic: bool = False, **sglang: Any) -> SlimeConfig:
    cfg = servers.recipe(model, tensor_parallel=ranks, sglang={"custom_weight_loader": LOADERS, **sglang})
    cfg.model.dtype, cfg.run.deterministic = dtype, deterministic
    cfg.sync.timeout_s = TIMEOUT_S
    return cfg


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "a", tied=True, dtype="bf16")


@pytest.fixture(scope="module")
def cfg(model: Path) -> SlimeConfig:
    return recipe(model, 2)


@pytest.fixture(scope="module")
def server(cfg: SlimeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of two ranks."""
    started = servers.start(cfg, tmp_path_factory.mktemp("server") / "engine_0.log")
    yield started
    started.stop()


@pytest.fixture
def world(cfg: SlimeConfig, server: Server, epochs: Iterator[int]) -> Iterator["World"]:
    made = World(cfg, server, next(epochs))
    yield made
    made.close()


@pytest.fixture(scope="module")
def epochs() -> Iterator[int]:
    return iter(range(1000))


class World:
    """A trainer, a channel, and the host of one server."""

    def __init__(self, cfg: SlimeConfig, server: Any, epoch: int) -> None:
        self.cfg, self.label, self.number = cfg, f"run/{epoch}/", -1
        self.trainer = Bits(Path(cfg.model.path))
        self.base = self.trainer.copied()
        self.host = Host(cfg, [server])
        self.fleet = Fleet([self.host])
        self.channel: Channel = open_channel(cfg, self.trainer, self.fleet, epoch)

    def close(self) -> None:
        self.host.close()

    def step(self, seed: int) -> None:
        self.trainer.mutate(seed, 0.05)
        self.number += 1
        self.channel.publish(self.number)

    def holds(self, bits: Tensors, folder: Path) -> bool:
        """Whether SGLang's own load of these tensors changes no byte of any rank."""
        [flippers] = self.host.flippers(folder)
        before = [flipper.dump() for flipper in flippers]
        saved, self.trainer.now = self.trainer.now, bits
        [engine] = self.host.live

        async def load() -> None:
            label = await engine._control.label()
            await engine.pause("in_place", TIMEOUT_S)
            await engine.load_whole(list(self.trainer.weights(None, 1 << 20)), label, TIMEOUT_S)  # type: ignore[arg-type]
            await engine.resume()

        self.host.run(load())
        self.trainer.now = saved
        after = [flipper.dump() for flipper in flippers]
        for flipper in flippers:
            flipper.close()
        return all((a[name] == b[name]).all() for a, b in zip(before, after, strict=True) for name in a)

    def arm(self, rank: int, times: int, how: str) -> None:
        """The next writes of a rank fail."""
        payload = buckets.serialise([(json.dumps({"rank": rank, "times": times, "how": how}), torch.empty(0))])
        [engine] = self.host.live

        async def send() -> None:
            await engine._control.pause("in_place")
            async with engine._session():
                await engine._control.update([payload] * engine.ranks, None, False, TIMEOUT_S, fault_loader.LOADER)
            await engine._control.resume()

        self.host.run(send())

    def sglangs_label(self) -> str:
        return self.host.run(self.host.live[0]._control.label())

    def answer(self) -> Generation:
        """One more version, near the model directory's weights, so that it gives numbers; and an answer of it alone."""
        self.trainer.now = [bits.copy() for bits in self.base]
        self.trainer.step(17)
        self.number += 1
        self.channel.publish(self.number)
        [generation] = ask(self.host.servers[0], f"{self.label}{self.number}", [[7, 8, 9]])
        return generation


def ask(server: Any, label: str, prompts: Sequence[list[int]], tokens: int = 12) -> list[Generation]:
    """Greedy answers, one after the other."""

    async def do() -> list[Generation]:
        async with EngineClient([server.spec.endpoint], vocab_size=servers.VOCAB, timeout_s=60, max_in_flight=100) as client:
            await client.expect(label)
            sampling = servers.Endless(max_new_tokens=tokens, temperature=0.0)
            return [await client.generate(prompt, sampling) for prompt in prompts]

    return asyncio.run(do())


# --- 1, 4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [pytest.param(p, marks=[] if p in QUICK else [pytest.mark.slow]) for p in faulty.POINTS])
def test_a_new_agent_takes_over_where_one_was_killed(
    point: str, cfg: SlimeConfig, server: Server, epochs: Iterator[int], tmp_path: Path
) -> None:
    """kill -9, with SGLang's update on its way, its session open, its scheduler paused; also, the engine is of an older epoch then."""
    faulty.kill_an_agent(cfg, server.spec.endpoint, point)
    world = World(cfg, server, next(epochs))
    try:
        assert world.holds(world.base, tmp_path)
        world.step(1)
        world.step(3)
        assert world.holds(world.trainer.now, tmp_path) and world.sglangs_label() == f"{world.label}1"
        world.answer()
    finally:
        world.close()


# --- 7, 8, 10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "times"), [("KeyboardInterrupt", 1), ("MemoryError", 2)])
def test_one_rank_fails_while_the_other_writes(how: str, times: int, world: World, tmp_path: Path) -> None:
    """It is undone in both, though SGLang says Success; the scheduler lives on. A second failure hits what puts the old bits back."""
    world.step(1)
    held = world.trainer.copied()
    world.arm(1, times, how)
    with pytest.raises(NotProven, match=f"engine 0: commit failed: rank 1: {how}: as the test wants it"):
        world.step(2)
    assert world.holds(held, tmp_path)
    world.number -= 1
    assert world.sglangs_label() == f"{world.label}0"
    world.step(3)
    assert world.holds(world.trainer.now, tmp_path)
    world.answer()


def test_a_rank_that_fails_again_and_again_is_fenced(world: World, tmp_path: Path) -> None:
    """It stays paused, half written, under a label that no client expects, until an agent takes over."""
    world.step(1)
    world.arm(0, 3, "OSError")
    with pytest.raises(NotProven, match=r"commit failed: rank 0: OSError(.|\n)*fenced: engine 0"):
        world.step(2)
    assert world.sglangs_label() == "run/fenced" and world.fleet.engines() == []
    with pytest.raises(NotProven, match="no engine is left"):
        world.step(3)


def test_commit_and_undo_come_twice(world: World, tmp_path: Path) -> None:
    """As when a client sends again what was done. The embedding is tied, the norms are replicas."""
    twice(world)
    world.step(1)
    assert world.holds(world.trainer.now, tmp_path)
    held = world.trainer.copied()
    world.fleet.lost = lambda action: action.do is Do.COMMIT
    with pytest.raises(NotProven, match="the answer was lost"):
        world.step(2)
    assert world.holds(held, tmp_path)
    world.fleet.lost = lambda action: False
    world.number -= 1
    world.step(3)
    assert world.holds(world.trainer.now, tmp_path)


def twice(world: World) -> None:
    control = world.host.live[0]._control
    update = control.update

    async def again(*args: Any, **kwargs: Any) -> None:
        await update(*args, **kwargs)
        await update(*args, **kwargs)

    control.update = again  # type: ignore[method-assign, assignment]


# --- 6 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_is_killed_in_the_middle_of_a_publication(cfg: SlimeConfig, tmp_path: Path) -> None:
    """kill -9 of all its processes, or of one rank half way through its writes; what starts anew is brought to the committed version."""
    server = servers.start(cfg, tmp_path / "engine_0.log")
    try:
        for epoch, when in enumerate(("prepared", "half written", "committed")):
            server = killed_and_back(when, cfg, server, World(cfg, server, epoch), tmp_path)
    finally:
        server.stop()


def killed_and_back(when: str, cfg: SlimeConfig, server: Server, world: World, folder: Path) -> Server:
    """The server that came after."""
    world.step(1)
    held = world.trainer.copied()
    if when == "half written":
        world.arm(1, 1, "kill")

    def ends(actions: Sequence[Action]) -> None:
        if (when, actions[0].do) in (("prepared", Do.COMMIT), ("committed", Do.RESUME)):
            server.stop()

    world.host.before = ends
    asked = "resume" if when == "committed" else "commit"
    with pytest.raises(NotProven, match=rf"engine 0: it died: asked to {asked}: .* was lost during"):
        world.step(2)
    if when == "committed":
        held = world.trainer.copied()  # proven, and so acknowledged
    server.stop()
    again = servers.start(cfg, folder / f"{when}.log")
    try:
        world.host.before = lambda actions: None
        world.host.servers = [again]
        world.host.live = [LiveEngine(again.spec.endpoint, 2, world.host._session, again)]
        world.host.run(world.host.weights.take_in(world.host.live[0]))
        assert world.holds(held, folder)
    except BaseException:
        again.stop()
        raise
    finally:
        world.close()
    return again


# --- 19 ---------------------------------------------------------------------------------------------------------------

PROMPTS = [list(range(5, 45)), [30, 31, 7] * 10, list(range(70, 10, -1)), [11] * 25]


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True], ids=["radix cache", "deterministic"])
def test_log_probs_after_a_delta_are_those_of_a_fresh_engine(deterministic: bool, tmp_path: Path) -> None:
    """A version comes in the middle of prefills in chunks and of decoding; prompts are asked before it, so that their prefixes are cached.
    A fresh engine that loads the same weights gives the same tokens, and log-probs equal to 1e-5, or to the bit in deterministic mode."""
    path = make_tiny(tmp_path / "model")
    sglang = {} if deterministic else {"chunked_prefill_size": 16}
    cfg = recipe(path, 1, "fp32", deterministic, **sglang)
    server = servers.start(cfg, tmp_path / "engine_0.log")
    world = World(cfg, server, 0)
    prompts = [*PROMPTS, *PROMPTS, *([*prompt, 9, 9] for prompt in PROMPTS)]
    try:
        world.cfg.sync.pause = world.host.weights._cfg.sync.pause = "drain" if deterministic else "retract"
        world.trainer.step(1)
        world.number = 0
        world.channel.publish(0)
        before = ask(server, "run/0/0", prompts)
        world.trainer.step(2)
        world.number = 1
        running = asyncio.run(publish_amid(world, server))
        after = ask(server, "run/0/1", prompts)
    finally:
        world.close()
        server.stop()
    assert deterministic or any(len(generation.versions) == 2 for generation in running), "nothing was under way"
    cfg.model.path = str(world.trainer.export(tmp_path / "export", path))
    server = servers.start(cfg, tmp_path / "engine_1.log")
    try:
        fresh = ask(server, servers.LOADED, prompts)
    finally:
        server.stop()
    assert [g.output_ids for g in after] == [g.output_ids for g in fresh]
    far = max(abs(a - b) for x, y in zip(after, fresh, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))
    assert far == 0.0 if deterministic else far < 1e-5
    assert deterministic or min(g.cached_tokens for g in [*before[4:], *after[4:]]) > 0, "no prefix came from the cache"
    moved = max(abs(a - b) for x, y in zip(before, fresh, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))
    assert moved > 1e-3, "the versions do not differ"


async def publish_amid(world: World, server: Server) -> list[Generation]:
    """Version 1 while long prompts are read and long answers are written."""
    pause = world.cfg.sync.pause
    async with EngineClient([server.spec.endpoint], vocab_size=servers.VOCAB, timeout_s=60, max_in_flight=100, pause=pause) as client:
        await client.expect("run/0/0")
        long = servers.Endless(max_new_tokens=50, temperature=0.0)
        first = [asyncio.create_task(client.generate(prompt, long)) for prompt in PROMPTS]
        await asyncio.sleep(0.1)
        first += [asyncio.create_task(client.generate(list(range(70)) + prompt * 2, long)) for prompt in PROMPTS[:2]]
        control = Control(client.endpoints[0], client._session)
        while not await control.running():
            await asyncio.sleep(0.005)
        await asyncio.to_thread(world.channel.publish, 1)
        return await asyncio.gather(*first)
