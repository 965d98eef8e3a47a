"""Faults of host agents and of what they speak over: kills, lost answers, cut connections, no room. docs/faults.md has the list."""

import contextlib
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slime.cluster import shared_folder
from slime.cluster.deadline import ProcessLost
from slime.sync.channel import EnginesLost, NotProven
from slime.sync.publication import Action, Do
from tests.sync import faulty
from tests.sync.faulty import Proxy, recipe
from tests.sync.toy_engine import ToyEngine
from tests.sync.world import World

pytestmark = pytest.mark.e2e


# --- agents that end, and agents beside one another (1, 17) -----------------------------------------------------------


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


def test_an_agent_ends_while_it_commits(two: World) -> None:
    """Nothing more is asked of anybody: the run is to start again, and new agents take both engines over."""
    two.step(1)

    def ends(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.COMMIT:
            two.fleet.dead.add(1)

    two.fleet.hosts[1].before = ends
    two.trainer.mutate(2, 0.03)
    with pytest.raises(ProcessLost, match="waiting for engine 1 to commit weights run/0/1: a process died or was lost"):
        two.channel.publish(1)
    assert two.engines[0].paused, "it holds what nobody has committed"
    with pytest.raises(NotProven, match="run/0/1 was interrupted; start the run again"):
        two.channel.publish(1)
    world = World(two.model, two.engines, epoch=1)
    world.check(world.base)
    world.step(3)
    world.close()


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


# --- answers that do not come (13) ------------------------------------------------------------------------------------


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


@pytest.fixture
def far(model: Path, engine: ToyEngine) -> Iterator[tuple[World, Proxy]]:
    """An engine of the user's behind a connection."""
    proxy = Proxy(engine.spec.endpoint.url.removeprefix("http://"))
    engine.spec.endpoint = replace(engine.spec.endpoint, url=proxy.url)
    world = World(model, [engine], timeout_s=1.5)
    world.fleet.hosts[0].live[0].server = None
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
    late = r"engine 0: it died: asked to commit: waiting for engine 0 to commit: nothing after .* s \(sync.timeout_s\).*; fenced"
    with pytest.raises(EnginesLost, match=late):
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


# --- no room (15) -----------------------------------------------------------------------------------------------------


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
