"""Faults in the engines: they end, restart, fail half way, get what is another's. docs/faults.md has the list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.sync.channel import EnginesLost, NotProven
from slime.sync.publication import Action, Do
from tests.sync import toy_engine
from tests.sync.toy_engine import ToyEngine
from tests.sync.world import World, Writes, restart

pytestmark = pytest.mark.e2e


def test_a_world_without_faults(world: World) -> None:
    """And that the check of it can fail."""
    world.check(world.base)
    world.step(1)
    world.step(2)
    assert not world.engines[0].holds(world.base)
    world.engines[0].models[1].fused.data[3, 3] += 1
    assert not world.engines[0].holds(world.trainer.now)


# --- engines that end (6) ---------------------------------------------------------------------------------------------


def crash_when(operation: str, ended: bool) -> tuple[str, toy_engine.Hook]:
    """The engine's process ends when it is asked this, or before it says what came of it."""

    async def hook(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) == operation:
            engine.crash()
            raise ConnectionError

    return ("after" if ended else "before"), hook


CRASHES = {
    "prepared": ("/pause_generation", False),
    "paused": ("/pause_generation", True),
    "in the session": ("/begin_weight_update", True),
    "asked to commit": ("commit", False),
    "committed": ("commit", True),
    "after its session": ("/end_weight_update", True),
    "going on": ("/continue_generation", False),
    "gone on": ("/continue_generation", True),
}


@pytest.mark.parametrize("when", CRASHES)
def test_an_engine_ends_in_the_middle_of_a_publication(when: str, two: World) -> None:
    """It is left out, the others get the version; it catches up when it is back."""
    two.step(1)
    side, hook = crash_when(*CRASHES[when])
    setattr(two.engines[1], side, hook)
    two.trainer.mutate(2, 0.03)
    two.channel.publish(1)
    two.number = 1
    assert two.engines[0].holds(two.trainer.now) and not two.engines[0].paused and two.engines[0].label == "run/0/1"
    assert two.fleet.engines() == ["engine 0"]
    setattr(two.engines[1], side, None)
    restart(two, 1)
    two.check()
    two.step(3)


@pytest.mark.parametrize("when", CRASHES)
def test_the_only_engine_ends_in_the_middle_of_a_publication(when: str, world: World) -> None:
    """The version is published again once it is back, or held by then."""
    world.step(1)
    held = world.trainer.copied()
    side, hook = crash_when(*CRASHES[when])
    setattr(world.engines[0], side, hook)
    world.trainer.mutate(2, 0.03)
    with pytest.raises(EnginesLost, match=r"weights run/0/1.* engine 0: it died: asked to \w+: engine 0 .* was lost during"):
        world.channel.publish(1)
    setattr(world.engines[0], side, None)
    restart(world, 0)
    committed = when in ("going on", "gone on")
    assert world.engines[0].holds(world.trainer.now if committed else held)
    assert (world.channel.publish(1) == {}) == committed
    world.number = 1
    world.check()
    world.step(3)


def test_an_engine_that_restarted_by_itself_between_prepare_and_commit(two: World) -> None:
    """It answers, with the model directory's weights: they are not taken for what was staged."""
    two.step(1)
    held = two.trainer.copied()

    def again(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.COMMIT:
            two.engines[1].crash()
            two.engines[1].start()

    two.fleet.hosts[1].before = again
    two.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match=r"were not published: engine 1: commit failed: .*; fenced: engine 1"):
        two.channel.publish(1)
    assert two.engines[0].holds(held) and not two.engines[0].paused
    assert two.engines[1].paused and two.engines[1].holds(two.base) and two.fleet.engines() == ["engine 0"]
    two.fleet.hosts[1].before = lambda actions: None
    restart(two, 1)
    two.check(held)
    two.step(3)


# --- writes that fail (7, 8) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 3])
def test_one_rank_fails_while_the_other_writes(times: int, writes: Writes, two: World) -> None:
    """And fails again while it puts the old bits back, once by itself and once when it is told to."""
    two.step(1)
    held = two.trainer.copied()
    writes.times = times
    two.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match="engine 0: commit failed: rank 1: RuntimeError: no memory") as raised:
        two.channel.publish(1)
    assert writes.failed == times and two.engines[1].holds(held) and not two.engines[1].paused
    if times == 3:
        assert "fenced: engine 0" in str(raised.value) and two.fleet.engines() == ["engine 1"]
        assert two.engines[0].paused and two.engines[0].label == "run/fenced"
        restart(two, 0)
    two.check(held)
    two.step(3)


@pytest.mark.parametrize("times", [1, 5])
def test_one_rank_fails_and_is_healed(times: int, writes: Writes, model: Path, engine: ToyEngine) -> None:
    world = World(model, [engine], on_mismatch="heal")
    world.step(1)
    writes.times = times
    world.trainer.mutate(2, 0.03)
    assert world.channel.publish(1)["sync/healed"] == 1
    world.number = 1
    world.check()
    writes.times = 0
    world.step(3)
    world.close()


def test_an_engine_that_cannot_be_healed_gets_no_requests(two: World) -> None:
    """The others go on; it stays paused under a label that no client expects."""
    two.cfg.sync.on_mismatch = "heal"
    two.step(1)

    async def hook(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) in ("commit", "audit"):
            engine.models[0].one.data += 1

    two.engines[1].before = hook
    two.trainer.mutate(2, 0.03)
    two.channel.publish(1)
    two.number = 1
    assert two.engines[0].holds(two.trainer.now) and not two.engines[0].paused and two.engines[0].label == "run/0/1"
    assert two.engines[1].paused and two.engines[1].label == "run/fenced" and two.fleet.engines() == ["engine 0"]
    two.trainer.mutate(3, 0.03)
    two.channel.publish(2)
    two.number = 2
    assert two.engines[0].holds(two.trainer.now) and two.engines[1].paused
    two.engines[1].before = None
    two.engines[1].crash()
    restart(two, 1)
    two.check()
    two.step(4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), RecursionError(), GeneratorExit()], ids=repr)
def test_nothing_that_is_raised_in_the_loader_gets_out(error: BaseException, writes: Writes, world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    writes.error, writes.times = error, 1  # type: ignore[assignment]
    world.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match=f"rank 1: {type(error).__name__}"):
        world.channel.publish(1)
    world.check(held)
    world.step(3)


# --- calls that come twice, files and models of others (10, 12) -------------------------------------------------------


def test_every_call_that_writes_comes_twice(world: World, writes: Writes) -> None:
    """As when a client sends again what was done."""
    world.step(1)

    async def again(engine: ToyEngine, path: str, body: dict[str, Any]) -> None:
        if toy_engine.operation(path, body) in ("commit", "undo"):
            engine.do(path, body)

    for side in ("before", "after"):
        setattr(world.engines[0], side, again)
        world.step(2)
        held = world.trainer.copied()
        writes.times = 1
        world.trainer.mutate(3, 0.03)
        with pytest.raises(NotProven, match=r"no memory|nothing is"):
            world.channel.publish(world.number + 1)
        world.check(held)
        setattr(world.engines[0], side, None)
    assert world.engines[0].calls.count("undo") == 4
    world.step(4)


def test_a_rank_is_given_the_file_of_another(world: World) -> None:
    world.step(1)
    held = world.trainer.copied()
    [host] = world.fleet.hosts

    def swapped(actions: Sequence[Action]) -> None:
        if actions[0].do is Do.PREPARE:
            one, two = sorted(host.weights._paths)
            paths = host.weights._paths
            paths[one], paths[two] = paths[two], paths[one]

    host.before = swapped
    world.trainer.mutate(2, 0.03)
    with pytest.raises(NotProven, match="was made for another live map; learn again"):
        world.channel.publish(1)
    world.check(held)
    host.before = lambda actions: None
    world.step(3)


def test_another_model_is_noticed_at_once(model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (tmp_path / "other").mkdir()
    save_file({name: tensor for name, tensor in tensors.items() if name != "down"}, tmp_path / "other" / "model.safetensors")
    World(model, [engine]).close()
    save_file(tensors | {"more": torch.zeros(3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=r"cannot follow deltas|serves another model"):
        World(tmp_path / "other", [engine])
    assert not engine.paused
