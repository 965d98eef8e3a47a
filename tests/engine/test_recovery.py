"""Engines that fail while they generate: real servers behind host agents, requests that never stop, and a driver that tends.

Every request is answered with the right weights, in deterministic mode with the same bits, and the engine comes back, proven.
"""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from slime.cluster.placement import RolePlacement
from slime.engine.arguments import cache_dir
from slime.engine.errors import EngineLost
from slime.engine.fleet import EngineFleet
from slime.engine.health import Kind, State
from slime.sync.protocol import Answer
from slime.sync.publication import Action, Do
from tests.engine import servers
from tests.engine.recovery import Rollouts, World, begin, came_back, goes_on, same_bits_everywhere, start, states, wait
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "a")


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
