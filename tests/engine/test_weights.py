"""Two real engines under the weight channel: what becomes of requests that are in flight, of engines that fail their proof, and how often
SGLang is called."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.config import SlimeConfig
from slime.engine import streaming
from slime.engine.client import EngineClient, Generation
from slime.engine.control import Control
from slime.engine.errors import StaleWeights
from slime.engine.server import Server
from slime.sync.channel import Channel, NotProven
from slime.sync.publication import Action, Do
from slime.sync.states import Fenced, Holds
from slime.types import VersionSpan
from tests.engine import servers
from tests.engine.flip_loader import LOADER, Flipper
from tests.engine.test_server import distance, hf_logprobs
from tests.engine.weights_double import Bits, Host, open_channel
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
TOKENS = 300
WELL = 20  # tokens after which a request is well under way
CLOSE = 1e-4  # between engine and transformers, fp32
PROMPTS = [list(range(5, 25)), [30, 31, 7] * 5, list(range(60, 20, -1))]
GREEDY = servers.Endless(max_new_tokens=TOKENS, temperature=0.0)
SHORT = servers.Endless(max_new_tokens=10, temperature=0.0)
EMBEDDING, KEYS = "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"
QKV, K_ROW = "model.layers.0.self_attn.qkv_proj.weight", 64  # the first row of k


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets of weights of one shape."""
    root = tmp_path_factory.mktemp("models")
    return make_tiny(root / "a", seed=0), make_tiny(root / "b", seed=1)


@pytest.fixture(scope="module")
def recipe(models: tuple[Path, Path]) -> SlimeConfig:
    cfg = servers.recipe(models[0], sglang={"custom_weight_loader": [LOADER]})
    cfg.rollout.max_response_tokens = TOKENS + 50
    return cfg


@pytest.fixture(scope="module")
def pair(recipe: SlimeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers."""
    root = tmp_path_factory.mktemp("servers")
    started = [Server(servers.spec(recipe, root / f"engine_{i}.log", name=f"engine {i}")) for i in range(2)]

    async def ready() -> None:
        await asyncio.gather(*(servers.ready(server, 120) for server in started))

    asyncio.run(ready())
    yield started
    for server in started:
        server.stop()


@dataclass
class World:
    """A channel to one or two engines that hold the first model's weights as version 0."""

    cfg: SlimeConfig
    models: tuple[Path, Path]
    host: Host
    weights: Bits
    channel: Channel
    ended: int = 0  # requests that were done when a publication amid them was

    def other(self) -> None:
        """The trainer has the second model's weights."""
        self.weights.now = Bits(self.models[1]).now

    def state(self, number: int) -> Any:
        receiver = self.host.live[number].state
        assert receiver is not None
        return receiver.state

    def client(self, engine: int = 0) -> EngineClient:
        return EngineClient(
            [self.host.servers[engine].spec.endpoint],
            vocab_size=servers.VOCAB,
            timeout_s=60,
            max_in_flight=100,
            pause=self.cfg.sync.pause,
        )

    def ask(self, engine: int, label: str) -> Generation:
        """A short answer to PROMPTS[0]."""

        async def do() -> Generation:
            async with self.client(engine) as client:
                await client.expect(label)
                return await client.generate(PROMPTS[0], SHORT)

        return asyncio.run(do())


Make = Callable[..., World]


@pytest.fixture
def world(pair: list[Server], recipe: SlimeConfig, models: tuple[Path, Path]) -> Iterator[Make]:
    """Makes a World: world(pause="retract", on_mismatch="heal", engines=2)."""
    with ExitStack() as stack:

        def make(engines: int = 1, **sync: str) -> World:
            cfg = replace(recipe, sync=replace(recipe.sync, **sync))
            host = stack.enter_context(Host(cfg, pair[:engines]))
            weights = Bits(models[0])
            channel = open_channel(cfg, weights, host)
            channel.publish(0)
            return World(cfg, models, host, weights, channel)

        yield make


# --- requests in flight -------------------------------------------------------------------------------------------------


async def while_generating(made: World, client: EngineClient, *, rids: Sequence[str | None] = (None,) * 3) -> list[Generation]:
    """Answers to PROMPTS, with version 1 published once they are well under way."""
    await client.expect("run/0/0")
    running = [asyncio.create_task(client.generate(prompt, GREEDY, rid=rid)) for prompt, rid in zip(PROMPTS, rids, strict=True)]
    well = asyncio.Event()
    probe = asyncio.create_task(watch(client, well))
    await asyncio.wait_for(well.wait(), 30)
    early = [task.exception() or "ended" for task in running if task.done()]
    assert not early, "requests ended before anything was published"
    await asyncio.to_thread(made.channel.publish, 1)
    made.ended = sum(task.done() for task in running)
    await probe
    return await asyncio.gather(*running)


async def watch(client: EngineClient, well: asyncio.Event) -> None:
    """One more request, which says when those that came before it have some tokens."""
    endpoint = client.endpoints[0]
    body = {"input_ids": [9, 8, 7], "sampling_params": GREEDY.to_sglang(), "stream": True}
    async with client._session.post(endpoint.url + "/generate", json=body, headers=endpoint.headers) as response:
        async for chunk in streaming.chunks(response.content, endpoint.name):
            if len(chunk["output_ids"]) >= WELL:
                well.set()


def spans(generation: Generation) -> list[tuple[str, int, int]]:
    return [(span.version, span.start, span.end) for span in generation.versions]


def test_retracted_requests_go_on_with_the_new_weights_alone(world: Make) -> None:
    """Every token is judged by transformers with the weights that its span names."""
    made = world(pause="retract")

    async def run() -> list[Generation]:
        async with made.client() as client:
            return await while_generating(made, client)

    made.other()
    for prompt, answer in zip(PROMPTS, asyncio.run(run()), strict=True):
        assert len(answer.output_ids) == TOKENS and answer.finish_reason == "length"
        [(first, start, switch), (second, again, end)] = spans(answer)
        assert (first, second, start, again, end) == ("run/0/0", "run/0/1", 0, switch, TOKENS)
        assert 0 < switch < TOKENS
        found = np.array(answer.logprobs)
        old, new = (np.abs(hf_logprobs(model, answer, prompt).numpy() - found) for model in made.models)
        assert old[:switch].max() < CLOSE and new[switch:].max() < CLOSE
        assert np.median(new[:switch]) > 100 * CLOSE < np.median(old[switch:]), "the models differ"


def test_requests_that_go_on_in_place_keep_their_prefix_and_new_ones_do_not_see_it(world: Make) -> None:
    made = world(pause="in_place")

    async def run() -> tuple[list[Generation], Generation, Generation, Generation]:
        async with made.client() as client:
            answers = await while_generating(made, client)
            async with made.client() as late:
                await late.expect("run/0/1")
                fresh, cached = await late.generate(PROMPTS[0], SHORT), await late.generate(PROMPTS[0], SHORT)
            stale = await client.generate(PROMPTS[0], SHORT)  # still expects version 0, whose prefix it finds
            return answers, fresh, cached, stale

    made.other()
    answers, fresh, cached, stale = asyncio.run(run())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.output_ids) == TOKENS and answer.finish_reason == "length"
        [(first, start, switch), (second, again, end)] = spans(answer)
        assert (first, second, start, again, end) == ("run/0/0", "run/0/1", 0, switch, TOKENS)
        assert 0 < switch < TOKENS
        old = np.abs(hf_logprobs(made.models[0], answer, prompt).numpy() - np.array(answer.logprobs))
        assert old[:switch].max() < CLOSE < np.median(old[switch:])
    assert spans(fresh) == spans(cached) == [("run/0/1", 0, 10)]
    assert fresh.cached_tokens == 0 < cached.cached_tokens
    assert max(distance(made.models[1], answer, PROMPTS[0]) for answer in (fresh, cached)) < CLOSE
    assert stale.cached_tokens > 0 and distance(made.models[1], stale, PROMPTS[0]) > 10 * CLOSE, (
        "old prefixes are there, under another name"
    )


def test_draining_waits_for_what_runs(world: Make) -> None:
    made = world(pause="drain")

    async def run() -> list[Generation]:
        async with made.client() as client:
            return await while_generating(made, client)

    made.other()
    for prompt, answer in zip(PROMPTS, asyncio.run(run()), strict=True):
        assert spans(answer) == [("run/0/0", 0, TOKENS)]
        assert distance(made.models[0], answer, prompt) < CLOSE
    assert made.ended == len(PROMPTS)
    after = made.ask(0, "run/0/1")
    assert spans(after) == [("run/0/1", 0, 10)] and distance(made.models[1], after, PROMPTS[0]) < CLOSE


def test_spans_from_a_stream_are_those_that_later_versions_tell(world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of SGLang before 0.5.19, against what 0.5.23 says of the same answers."""
    made = world(pause="in_place")
    told: dict[str, list[VersionSpan]] = {}
    sizes: list[int] = []
    chunks = streaming.chunks

    async def watched(lines: AsyncIterable[bytes], engine: str) -> AsyncIterator[dict[str, Any]]:
        seen = 0
        async for chunk in chunks(lines, engine):
            sizes.append(len(chunk["output_ids"]) - seen)
            seen = len(chunk["output_ids"])
            meta = chunk["meta_info"]
            told[meta["id"]] = [VersionSpan(**span) for span in meta.get("weight_versions", ())]  # the last chunk has them
            yield chunk

    monkeypatch.setattr(streaming, "chunks", watched)

    async def run() -> dict[str, Generation]:
        async with made.client() as client:
            client._facts = [replace(client._facts[0], version_spans=False)]
            rids = [f"{number:032x}" for number in range(len(PROMPTS))]
            return dict(zip(rids, await while_generating(made, client, rids=rids), strict=True))

    made.other()
    for rid, answer in asyncio.run(run()).items():
        assert [span.version for span in answer.versions] == [span.version for span in told[rid]] == ["run/0/0", "run/0/1"]
        assert len(answer.output_ids) == answer.versions[-1].end == told[rid][-1].end == TOKENS
        assert abs(answer.versions[0].end - told[rid][0].end) <= max(sizes)
    assert max(sizes) < 10, "chunks are small"


# --- calls --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_a_pause_takes_five_calls(pause: str, world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(engines=2, pause=pause)
    calls: dict[str, list[str]] = {"engine 0": [], "engine 1": []}
    call = Control._call

    async def counted(control: Control, method: str, path: str, *arguments: Any) -> Any:
        calls[control.endpoint.name].append(path.split("?")[0])
        return await call(control, method, path, *arguments)

    monkeypatch.setattr(Control, "_call", counted)
    made.weights.step(1)
    made.channel.publish(1)
    for of_engine in calls.values():
        paused, resumed = of_engine.index("/pause_generation"), of_engine.index("/continue_generation")
        assert resumed + 1 - paused <= 5, of_engine
        assert Counter(of_engine)["/update_weights_from_tensor"] == 1 and len(of_engine) <= 5


# --- engines that fail their proof ----------------------------------------------------------------------------------------


def keys_flipper(made: World, engine: int, folder: Path) -> Callable[[], None]:
    """Flips a bit in the keys' projection of an engine."""
    flipper: Flipper = made.host.flippers(folder)[engine][0]
    return lambda: flipper.flip(QKV, (K_ROW * 64 + 5) * 4 + 2, 6)


def step_beside(made: World, seed: int) -> None:
    """A small step that leaves the flipped element alone."""
    made.weights.step(seed)
    number = made.weights.spec().index[KEYS]
    made.weights.now[number][5] = made.weights.held[number][5]


def matches(made: World, engine: int, label: str, folder: Path, bits: list[np.ndarray]) -> None:
    """An engine answers with version `label`, whose weights `bits` are, as transformers judges."""
    kept, made.weights.now = made.weights.now, bits
    exported = made.weights.export(folder / f"{engine}-{label.replace('/', '-')}", made.models[0])
    made.weights.now = kept
    answer = made.ask(engine, label)
    assert spans(answer) == [(label, 0, 10)] and distance(exported, answer, PROMPTS[0]) < CLOSE


def holds(made: World, engine: int, label: str) -> bool:
    state = made.state(engine)
    return isinstance(state, Holds) and state.held.label == label


def test_a_failed_proof_brings_every_engine_back(world: Make, tmp_path: Path) -> None:
    """The engine that is fine too."""
    made = world(engines=2)
    flip = keys_flipper(made, 1, tmp_path)
    made.weights.step(1)
    made.channel.publish(1)
    before = made.weights.copied()

    def disturb(actions: Sequence[Action]) -> None:
        if actions[0].do in (Do.COMMIT, Do.UNDO):
            flip()

    step_beside(made, 2)
    made.host.before = disturb
    with pytest.raises(NotProven, match=rf"weights run/0/2 were not published: engine 1: commit failed: .*{KEYS} are not the trainer's"):
        made.channel.publish(2)
    made.host.before = lambda actions: None
    assert [(a.action.do, a.action.engine, bool(a.failed)) for a in made.host.answers[-8:]] == [
        *((Do.PREPARE, f"engine {i}", False) for i in range(2)),
        *((Do.COMMIT, f"engine {i}", i == 1) for i in range(2)),
        *((Do.UNDO, f"engine {i}", False) for i in range(2)),
        *((Do.RESUME, f"engine {i}", False) for i in range(2)),
    ]
    for engine in range(2):
        assert holds(made, engine, "run/0/1")
        matches(made, engine, "run/0/1", tmp_path, before)
    made.channel.publish(2)
    for engine in range(2):
        matches(made, engine, "run/0/2", tmp_path, made.weights.now)


def test_an_engine_that_cannot_be_brought_back_is_fenced(world: Make, tmp_path: Path) -> None:
    made = world(engines=2)
    flip = keys_flipper(made, 1, tmp_path)
    made.weights.step(1)
    made.channel.publish(1)
    before = made.weights.copied()
    step_beside(made, 2)
    flip()
    with pytest.raises(NotProven, match=rf"engine 1: commit failed: .*{KEYS} are not .*; fenced: engine 1"):
        made.channel.publish(2)
    assert isinstance(made.state(1), Fenced) and made.host.engines() == ["engine 0"]
    assert holds(made, 0, "run/0/1")
    matches(made, 0, "run/0/1", tmp_path, before)

    with pytest.raises(StaleWeights, match="engine 1 holds weights run/fenced; expected run/0/1"):
        made.ask(1, "run/0/1")
    made.channel.publish(2)
    matches(made, 0, "run/0/2", tmp_path, made.weights.now)


def test_an_engine_that_fails_its_proof_is_healed(world: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = world(engines=2, on_mismatch="heal")
    flip = keys_flipper(made, 1, tmp_path)
    made.weights.step(1)
    assert made.channel.publish(1)["sync/healed"] == 0
    step_beside(made, 2)
    flip()
    assert made.channel.publish(2)["sync/healed"] == 1
    [failed] = [answer for answer in made.host.answers if answer.failed]
    assert failed.action == Action(Do.COMMIT, "engine 1") and KEYS in failed.failed
    assert f"engine 1: weights run/0/2: the live bits of {KEYS} are not the trainer's; loading all of them" in caplog.text
    for engine in range(2):
        assert holds(made, engine, "run/0/2")
        matches(made, engine, "run/0/2", tmp_path, made.weights.now)
    made.weights.step(3)
    assert made.channel.publish(3)["sync/healed"] == 0


@pytest.mark.parametrize("on_mismatch", ["stop", "heal"])
def test_a_flipped_bit_among_those_that_change_is_caught_before_it_is_overwritten(on_mismatch: str, world: Make, tmp_path: Path) -> None:
    """The base that a delta is written onto is checked while it is staged; the proof of the new version could not see it any more."""
    made = world(engines=2, on_mismatch=on_mismatch)
    flip = keys_flipper(made, 1, tmp_path)
    made.weights.now[made.weights.spec().index[KEYS]][5] ^= 1
    flip()
    if on_mismatch == "heal":
        assert made.channel.publish(1)["sync/healed"] == 1
        for engine in range(2):
            matches(made, engine, "run/0/1", tmp_path, made.weights.now)
        return
    with pytest.raises(NotProven, match=rf"engine 1: prepare failed: .*{KEYS} are not the trainer's"):
        made.channel.publish(1)
    assert holds(made, 0, "run/0/0") and spans(made.ask(0, "run/0/0")) == [("run/0/0", 0, 10)]
