"""A world in which engines fail: a trainer's weights, a channel, real servers behind host agents, and requests that never stop."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.engine.client import EngineClient, Generation
from slime.engine.fleet import EngineFleet
from slime.engine.health import State, Trouble, Turn
from slime.sync.channel import Channel, EnginesLost
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.weights_double import Bits

BACK_S = 60.0  # within which tokens/s is what it was, from the engine's return on
AT_ONCE = 8  # requests under way
SEEDS = 24


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


def wait(until: Callable[[], bool], timeout_s: float, what: str) -> None:
    give_up = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < give_up, f"waiting for {what}: nothing after {timeout_s:g} s"
        time.sleep(0.2)


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
