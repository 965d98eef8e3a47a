"""Engines that fail while they generate: real servers behind host agents, requests that never stop, and a driver that tends.

Every request is answered with the right weights, in deterministic mode with the same bits, and the engine comes back, proven.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.engine.arguments import cache_dir
from slime.engine.client import EngineClient, Generation
from slime.engine.errors import EngineLost
from slime.engine.fleet import EngineFleet
from slime.engine.health import Kind, State, Trouble, Turn
from slime.sync.channel import Channel, EnginesLost
from slime.sync.protocol import Answer
from slime.sync.publication import Action, Do
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.weights_double import Bits
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
BACK_S = 60.0  # within which tokens/s is what it was, from the engine's return on
AT_ONCE = 8  # requests under way
SEEDS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "a")


def recipe(model: Path, python: str, engines: int) -> SlimeConfig:
    cfg = servers.recipe(model, engines=engines, engine_python=python, health_timeout_s=3.0, request_timeout_s=20.0)
    cfg.run.deterministic, cfg.sync.timeout_s = True, 60.0
    return cfg


@dataclass
class World:
    """A trainer, a channel and engines."""

    cfg: SlimeConfig
    fleet: EngineFleet
    weights: Bits
    channel: Channel
    number: int = 0
    told: list[Turn] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"run/0/{self.number}"

    def step(self) -> None:
        """Other weights."""
        self.weights.step(self.number + 1)
        self.number += 1

    def publish(self) -> None:
        while True:
            try:
                self.channel.publish(self.number)
                return
            except EnginesLost:
                self.fleet.wait_for_engines(90)

    def tend(self) -> list[Turn]:
        turns = self.fleet.tend()
        self.told += turns
        return turns

    def port(self, engine: int) -> str:
        return self.fleet.endpoints()[engine].url.rpartition(":")[2]

    def main(self, engine: int) -> psutil.Process:
        """The server's first process, the leader of its group."""
        found = [psutil.Process(pid) for pid in servers.processes_of(f"--port\0{self.port(engine)}")]
        [main] = [process for process in found if os.getpgid(process.pid) == process.pid and "guard" not in " ".join(process.cmdline())]
        return main

    def wait_until_all_are_back(self) -> None:
        wait(lambda: (self.tend() and False) or self.healthy() == set(range(self.cfg.rollout.engines)), 120, "every engine to be back")

    def healthy(self) -> set[int]:
        last = {turn.engine: turn.state for turn in self.told}
        return {int(name.split()[1]) for name, state in last.items() if state is State.HEALTHY}

    def client(self, engines: Sequence[int] | None = None) -> EngineClient:
        found = self.fleet.endpoints()
        chosen = found if engines is None else [found[i] for i in engines]
        rollout, sync = self.cfg.rollout, self.cfg.sync
        wait_s = rollout.start_timeout_s + sync.timeout_s
        return EngineClient(chosen, vocab_size=servers.VOCAB, timeout_s=rollout.request_timeout_s, max_in_flight=100, wait_s=wait_s)

    def mischief(self, engine: int, what: str) -> None:
        self._flag(engine).write_text(what)

    def well_behaved(self, engine: int) -> None:
        self._flag(engine).unlink()

    def _flag(self, engine: int) -> Path:
        return Path(str(self.cfg.rollout.engine_python)).parent / f"mischief.{self.port(engine)}"

    def close(self) -> None:
        self.fleet.stop()


def start(placement: RolePlacement, model: Path, folder: Path, engines: int, python: str) -> World:
    cfg = recipe(model, python, engines)
    return begin(cfg, EngineFleet.start(cfg, placement, folder, "run"), model)


def begin(cfg: SlimeConfig, fleet: EngineFleet, model: Path) -> World:
    weights = Bits(model)
    channel = Channel(cfg.sync, weights, fleet, WeightVersion(0, 0, "run"))
    channel.open()
    channel.publish(0)
    return World(cfg, fleet, weights, channel)


@pytest.fixture(scope="module")
def pair(placement: RolePlacement, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    python = servers.mischievous(cache_dir() / "mischief")  # whose server arguments are listed once, not for every test
    world = start(placement, model, tmp_path_factory.mktemp("pair"), 2, python)
    yield world
    world.close()
    assert not servers.processes_of(f"--model-path={model}\0--dtype"), "orphans"


@pytest.fixture
def two(pair: World) -> World:
    """Both well, at a version of this test's own, with nothing counted."""
    pair.wait_until_all_are_back()
    pair.step()
    pair.publish()
    return pair


def wait(until: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < give_up, f"waiting for {what}: nothing after {timeout_s:g} s"
        time.sleep(0.2)


# --- requests that never stop --------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """Requests with a few seeds, over and over, while a driver's loop tends."""

    world: World
    client: EngineClient
    answers: list[tuple[int, Generation]] = field(default_factory=list)  # with their seeds
    troubles: list[Trouble] = field(default_factory=list)
    asked: int = 0
    stopped: bool = False

    async def run(self, story: Callable[["Rollouts"], None]) -> None:
        """Until the story, on a thread of its own, has ended."""
        await asyncio.to_thread(self.world.tend)
        self.client.engines(self.world.told)
        await self.client.expect(self.world.label)
        jobs = [asyncio.create_task(self._ask(first)) for first in range(AT_ONCE)] + [asyncio.create_task(self._tend())]
        told = asyncio.create_task(asyncio.to_thread(story, self))
        await asyncio.wait([told, *jobs], return_when=asyncio.FIRST_COMPLETED)
        self.stopped = True
        await asyncio.gather(*jobs)
        await told

    async def _ask(self, first: int) -> None:
        seed = first
        while not self.stopped:
            sampling = servers.Endless(max_new_tokens=20 + seed % 20, seed=1000 + seed)
            self.asked += 1
            self.answers.append((seed, await self.client.generate(prompt(seed), sampling, session=self.asked)))
            seed = (seed + AT_ONCE) % SEEDS

    async def _tend(self) -> None:
        while not self.stopped:
            found = self.client.troubles()
            self.troubles += found
            await asyncio.to_thread(self.world.fleet.report, found)
            self.client.engines(await asyncio.to_thread(self.world.tend))
            await asyncio.sleep(0.2)

    def tokens_per_s(self, since_s: float) -> float:
        now = time.time()
        return sum(len(a.output_ids) for _, a in list(self.answers) if since_s <= a.finished_s <= now) / (now - since_s)

    def measure(self, seconds: float) -> float:
        begun = time.time()
        time.sleep(seconds)
        return self.tokens_per_s(begun)


def prompt(seed: int) -> list[int]:
    return [5 + (seed * 7 + i) % 70 for i in range(4 + seed % 9)]


def came_back(turns: list[Turn], engine: str) -> bool:
    """Whether it was started anew and is proven."""
    found = [turn.state for turn in turns if turn.engine == engine]
    return State.RESTARTING in found and found[-1] is State.HEALTHY


def states(world: World, engine: int) -> list[State]:
    return [turn.state for turn in world.told if turn.engine == f"engine {engine}"]


def goes_on(world: World, fault: Callable[[], None], victim: int = 1) -> Rollouts:
    """Requests go on while the victim fails and comes back; what they were answered is right, and as much as before."""
    found: list[Rollouts] = []

    def story(rollouts: Rollouts) -> None:
        name = f"engine {victim}"
        before = rollouts.measure(3.0)
        count, asked = len(world.told), len(rollouts.answers)
        fault()
        wait(lambda: came_back(world.told[count:], name), 120, f"{name} to be back")
        back_s = time.monotonic()
        assert len(rollouts.answers) > asked or world.cfg.rollout.engines == 1, "the other one answers meanwhile"
        wait(lambda: rollouts.measure(3.0) >= 0.5 * before, BACK_S, f"{before:.0f} tokens/s again")
        recent = [a for _, a in rollouts.answers[-200:] if a.engine == name]
        assert recent, f"{name} is routed to again"
        assert time.monotonic() - back_s < BACK_S
        found.append(rollouts)

    async def run() -> None:
        async with world.client() as client:
            await Rollouts(world, client).run(story)

    asyncio.run(run())
    [rollouts] = found
    assert {span.version for _, answer in rollouts.answers for span in answer.versions} == {world.label}
    said: dict[int, tuple[list[int], list[float]]] = {}
    for seed, answer in rollouts.answers:
        assert said.setdefault(seed, (answer.output_ids, answer.logprobs)) == (answer.output_ids, answer.logprobs), "other bits"
    assert len(said) == SEEDS and {a.engine for _, a in rollouts.answers} == {f"engine {i}" for i in range(world.cfg.rollout.engines)}
    same_bits_everywhere(world)
    return rollouts


def same_bits_everywhere(world: World) -> None:
    """Each engine by itself holds the version and gives what the others give."""

    async def ask(engine: int) -> tuple[list[int], list[float]]:
        async with world.client([engine]) as client:
            await client.expect(world.label)
            answer = await client.generate(list(range(5, 25)), servers.Endless(max_new_tokens=30, seed=1))
            return answer.output_ids, answer.logprobs

    answers = [asyncio.run(ask(engine)) for engine in range(world.cfg.rollout.engines)]
    assert all(answer == answers[0] for answer in answers)


def test_a_killed_engine_is_replaced_and_its_requests_are_asked_again(two: World) -> None:
    victim = two.main(1)
    family = [victim, *victim.children(recursive=True)]
    rollouts = goes_on(two, lambda: victim.send_signal(signal.SIGKILL))
    assert states(two, 1)[-5:] in (
        [State.SUSPECT, State.DEAD, State.RESTARTING, State.STALE, State.HEALTHY],
        [State.HEALTHY, State.DEAD, State.RESTARTING, State.STALE, State.HEALTHY],
    )
    assert {t.kind for t in rollouts.troubles} <= {Kind.LOST} and {t.engine for t in rollouts.troubles} <= {"engine 1"}
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_an_engine_whose_scheduler_hangs_is_replaced(two: World) -> None:
    """Its HTTP server answers as ever."""
    [scheduler] = [p for p in two.main(1).children(recursive=True) if "scheduler" in p.name() + " ".join(p.cmdline())]
    goes_on(two, lambda: scheduler.send_signal(signal.SIGSTOP))
    assert "rollout.health_timeout_s" in [t.reason for t in two.told if t.state is State.DEAD][-1]
    assert not scheduler.is_running() or scheduler.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_an_engine_that_is_stopped_as_a_whole_is_replaced(two: World) -> None:
    """Its guard too."""
    main = two.main(1)
    family = [main, *main.children(recursive=True), psutil.Process(main.ppid())]

    def stop() -> None:
        for process in family:
            process.send_signal(signal.SIGSTOP)

    goes_on(two, stop)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kind"), [("cut", Kind.GARBAGE), ("odd", Kind.GARBAGE), ("slow", Kind.LATE)])
def test_an_engine_with_late_answers_or_none_is_replaced(what: str, kind: Kind, two: World) -> None:
    def fault() -> None:
        two.mischief(1, what)
        wait(lambda: states(two, 1)[-1] is not State.HEALTHY, 60, "it to be noticed")
        two.well_behaved(1)

    rollouts = goes_on(two, fault)
    assert kind in {t.kind for t in rollouts.troubles}


@pytest.mark.slow
@pytest.mark.parametrize("do", [Do.PREPARE, Do.COMMIT, Do.RESUME], ids=str)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_engine_fails_while_a_version_is_published(how: signal.Signals, do: Do, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one gets it; the version after it goes to both."""
    perform = EngineFleet.perform
    victim, count = two.main(1), len(two.told)
    family = [victim, *victim.children(recursive=True)]

    def struck(fleet: EngineFleet, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        if actions[0].do is do:
            for process in family:
                process.send_signal(how)
        return perform(fleet, actions, label, min(timeout_s, 8.0))

    with monkeypatch.context() as patch:
        patch.setattr(EngineFleet, "perform", struck)
        two.step()
        two.channel.publish(two.number)
    assert two.fleet.engines() == ["engine 0"]
    wait(lambda: (two.tend() and False) or came_back(two.told[count:], "engine 1"), 120, "engine 1 to be back")
    same_bits_everywhere(two)
    two.step()
    two.publish()
    same_bits_everywhere(two)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_the_only_engine_fails_and_is_waited_for_until_it_is_given_up(placement: RolePlacement, model: Path, tmp_path: Path) -> None:
    """Amid requests, before and amid a publication; in the end it cannot be started any more."""
    world = start(placement, model, tmp_path, 1, servers.mischievous(tmp_path))
    try:
        world.step()
        world.publish()
        goes_on(world, lambda: world.main(0).kill(), victim=0)
        world.main(0).kill()
        world.step()
        world.publish()
        same_bits_everywhere(world)
        python = Path(str(world.cfg.rollout.engine_python))
        python.write_text("#!/bin/sh\nexit 3\n")
        world.main(0).kill()
        with pytest.raises(EngineLost, match=r"engine 0 is given up: it was brought back 3 times .*rollout.max_restarts.*exit code 3"):
            wait(lambda: world.tend() and False, 90, "it to be given up")
    finally:
        world.close()


@pytest.mark.slow
def test_a_server_of_the_user_s_is_left_alone_and_used_again_when_it_answers(
    placement: RolePlacement, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped for a while, amid requests."""
    cfg = servers.recipe(model, health_timeout_s=2.0, request_timeout_s=30.0)
    cfg.run.deterministic, cfg.sync.timeout_s = True, 20.0
    server = servers.start(cfg, tmp_path / "engine_1.log")
    monkeypatch.setenv("ENGINE_KEY", server.spec.endpoint.key)
    cfg.rollout.external_urls, cfg.rollout.external_key_env = [server.spec.endpoint.url], "ENGINE_KEY"
    world = begin(cfg, EngineFleet.start(cfg, None, tmp_path, "run"), model)
    main = world.main(0)
    family = [main, *main.children(recursive=True)]
    try:

        def stops_for_a_while() -> None:
            for process in family:
                process.send_signal(signal.SIGSTOP)
            wait(lambda: states(world, 0)[-1] is State.DEAD, 30, "it to be noticed")
            for process in family:
                process.send_signal(signal.SIGCONT)

        def story(rollouts: Rollouts) -> None:
            rollouts.measure(1.0)
            stops_for_a_while()
            wait(lambda: states(world, 0)[-1] is State.HEALTHY, 60, "it to be back")
            assert rollouts.measure(2.0) > 0

        async def run() -> None:
            async with world.client() as client:
                await Rollouts(world, client).run(story)

        asyncio.run(run())
        assert [*map(str, states(world, 0))] == ["healthy", "suspect", "dead", "stale", "healthy"]
        world.step()
        world.publish()
        same_bits_everywhere(world)
    finally:
        world.close()
        assert server.alive and all(process.is_running() for process in family), "it is the user's"
        server.stop()
