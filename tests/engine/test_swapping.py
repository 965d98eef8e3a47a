"""Engines that leave their devices and come back: real servers behind host agents, on a CPU, where nothing is freed. All else happens."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from slime.cluster.placement import RolePlacement
from slime.engine.agent import open_session
from slime.engine.arguments import this_python
from slime.engine.fleet import EngineFleet
from slime.engine.health import State
from slime.engine.live import LiveEngine
from slime.sync.channel import Channel
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.recovery import World, recipe, same_bits_everywhere, states, wait
from tests.engine.weights_double import Bits
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "a")


@pytest.fixture(scope="module")
def pair(placement: RolePlacement, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    cfg = recipe(model, servers.PYTHON or this_python(), 2)
    cfg.cluster.share, cfg.sync.timeout_s = "swap", 30.0
    fleet = EngineFleet.start(cfg, placement, tmp_path_factory.mktemp("pair"), "run")
    weights = Bits(model)
    channel = Channel(cfg.sync, weights, fleet, WeightVersion(0, 0, "run"), away=True)
    channel.open(between=fleet.leave)
    channel.publish(0)
    world = World(cfg, fleet, weights, channel)
    fleet.enter()
    yield world
    world.close()
    assert not servers.processes_of(f"--model-path={model}\0--dtype"), "orphans"


@pytest.fixture
def two(pair: World) -> World:
    """Both there and well, at a version of this test's own, with nothing counted."""
    pair.wait_until_all_are_back()
    pair.fleet.leave()
    wait_until_all_are_away(pair)
    pair.step()
    pair.publish()
    pair.fleet.enter()
    pair.wait_until_all_are_back()
    return pair


def wait_until_all_are_away(world: World) -> None:
    """Until the driver has heard of it."""
    wait(lambda: (world.tend() and False) or world.healthy() == set(), 60, "every engine to be stale")


def scribble(world: World, engine: int, other: Path) -> None:
    """Other weights, as memory that was somebody else's would be."""

    async def load() -> None:
        async with open_session() as session:
            live = LiveEngine(world.fleet.endpoints()[engine], 1, session)
            await live.halt()
            await live.load_whole([list(load_file(other / "model.safetensors").items())], "run/scribbled", 60)

    asyncio.run(load())


def test_they_come_back_with_the_weights_that_were_published_meanwhile(two: World, tmp_path: Path) -> None:
    count = len(two.told)
    two.fleet.leave()
    assert two.fleet.engines() == []
    wait_until_all_are_away(two)
    assert [turn.state for turn in two.told[count:]] == [State.STALE] * 2
    other = make_tiny(tmp_path / "other", seed=9)
    for engine in range(2):
        scribble(two, engine, other)
    two.step()
    two.publish()
    assert two.fleet.engines() == []
    two.fleet.enter()
    two.wait_until_all_are_back()
    assert [turn.state for turn in two.told[count:]] == [State.STALE] * 2 + [State.HEALTHY] * 2
    same_bits_everywhere(two)


def test_they_leave_again_and_again_and_are_not_given_up(two: World) -> None:
    """It is no failure, and none of rollout.max_restarts."""
    for _ in range(two.cfg.rollout.max_restarts + 2):
        two.fleet.leave()
        wait_until_all_are_away(two)
        two.fleet.enter()
        two.wait_until_all_are_back()
    same_bits_everywhere(two)
    assert State.DEAD not in states(two, 0)


def test_one_that_is_killed_meanwhile_is_started_anew_when_it_may(two: World) -> None:
    two.fleet.leave()
    count = len(two.told)
    two.main(1).send_signal(signal.SIGKILL)
    wait(lambda: (two.tend() and False) or states(two, 1)[-1] is State.DEAD, 60, "it to be noticed")
    asyncio.run(asyncio.sleep(3.0))
    two.tend()
    assert states(two, 1)[-1] is State.DEAD and not servers.processes_of(f"--port\0{two.port(1)}"), "the memory is the trainer's"
    two.step()
    two.publish()
    two.fleet.enter()
    two.tend()
    assert two.healthy() >= {0}, "the other one is not waited for"
    two.wait_until_all_are_back()
    assert [turn.state for turn in two.told[count:] if turn.engine == "engine 1"][-2:] == [State.STALE, State.HEALTHY]
    same_bits_everywhere(two)


def test_one_that_does_not_leave_is_ended(two: World) -> None:
    """Stopped as a whole, it answers nothing and would keep its memory for ever."""
    main = two.main(0)
    family = [main, *main.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    two.fleet.leave()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    two.step()
    two.publish()
    two.fleet.enter()
    two.wait_until_all_are_back()
    same_bits_everywhere(two)


def test_one_that_is_starting_is_ended_too(two: World) -> None:
    two.main(1).send_signal(signal.SIGKILL)
    wait(lambda: (two.tend() and False) or states(two, 1)[-1] is State.RESTARTING, 60, "it to be started anew")
    wait(lambda: bool(servers.processes_of(f"--port\0{two.port(1)}")), 60, "its process")
    two.fleet.leave()
    assert not servers.processes_of(f"--port\0{two.port(1)}")
    two.fleet.enter()
    two.wait_until_all_are_back()
    same_bits_everywhere(two)
