"""Faults of a trainer whose versions are files: kills and resumes, two at once, late readers. docs/faults.md has the list."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.sync import chain, fold, transport
from slime.sync.manifest import verify
from slime.sync.places import Missing
from slime.sync.publication import Do
from slime.sync.store import SplitBrain, WeightStore
from slime.sync.store_fsspec import open_store
from slime.sync.store_local import LocalStore
from tests.engine.weights_double import Bits
from tests.sync.faulty import Fleet
from tests.sync.toy_engine import ToyEngine
from tests.sync.world import World

pytestmark = pytest.mark.e2e


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are bytes where Ray would have references."""
    monkeypatch.setattr(transport.deadline, "get", lambda refs, *_: refs)


# --- a trainer is killed (5) ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The trainer's end."""


def kill_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, ended: bool, condition: Callable[..., bool] | None = None
) -> None:
    """The trainer ends at the `call`-th call of a method, before or after it."""
    do, count = getattr(owner, name), iter(range(10**6))

    def dies(*args: Any, **kwargs: Any) -> Any:
        last = (condition is None or condition(*args)) and next(count) == call
        if last and not ended:
            raise Killed
        result = do(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dies)


def doing(do: Do) -> Callable[..., bool]:
    return lambda self, actions, *_: any(action.do is do for action in actions)


DEATHS: dict[str, tuple[Any, str, int, bool, Any]] = {
    "before any part": (LocalStore, "put", 0, False, None),
    "between parts": (LocalStore, "put", 1, False, None),
    "before the manifest": (WeightStore, "_move", 0, False, None),
    "after the manifest": (WeightStore, "publish", 0, True, None),
    "after the offer": (Fleet, "offer", 0, True, None),
    "before the commit": (Fleet, "perform", 0, False, doing(Do.COMMIT)),
    "after the commit": (Fleet, "perform", 0, True, doing(Do.COMMIT)),
    "before the acknowledgement": (Bits, "acknowledge", 0, False, None),
    "after the acknowledgement": (Bits, "acknowledge", 0, True, None),
    "after the host copies": (Fleet, "advance", 0, True, None),
    "while files are deleted": (WeightStore, "remove", 0, False, None),
}


@pytest.mark.parametrize("point", DEATHS)
def test_a_trainer_is_killed_and_resumes_from_an_older_checkpoint(
    point: str, key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"key_env": "FAULTY_KEY", "transport": "store", "keep": 1, "anchor_every": 2}
    world = World(model, [engine], where=tmp_path, **settings)
    saved: list[Any] = []
    for seed in range(4):
        world.step(seed + 1)
        saved.append(world.trainer.copied())
    with monkeypatch.context() as patch:
        kill_at(patch, *DEATHS[point])
        world.trainer.mutate(9, 0.1)
        with pytest.raises(Killed):
            world.channel.publish(4)
    unsaved = world.trainer.copied()
    world.close()
    check_files(tmp_path, world, key, {3: saved[3], 4: unsaved})

    world = World(model, [engine], where=tmp_path, **settings)
    assert world.label == "run/1/"
    world.check(world.base)
    world.trainer.now, world.number = [bits.copy() for bits in saved[1]], 0
    world.publish()
    check_files(tmp_path, world, key, {1: saved[1]})
    for seed in range(3):
        world.step(20 + seed)
        check_files(tmp_path, world, key, {world.number: world.trainer.now})
    left = list(WeightStore(open_store(str(tmp_path), 10), "run", key).manifests())
    assert {manifest.epoch for manifest in left} == {1}, "what was before the resume is needed by nobody and stays"
    world.close()


def check_files(where: Path, world: World, key: bytes, may_be: dict[int, list[Any]]) -> None:
    """A chain of files leads from the model directory, or an anchor, to the newest version, and its bits are what the trainer had."""
    store = WeightStore(open_store(str(where), 10), "run", key)
    newest = store.latest()
    assert newest is not None
    manifests = list(store.manifests())
    weights = fold.Weights(world.trainer.spec(), "run", [bits.copy() for bits in world.base])
    for step in chain.plan(manifests, (newest.epoch, newest.number), None, weights.root).steps:
        verify(step, key)
        weights.apply(step, store.parts(step))
    assert weights.root == newest.root
    assert all((a == b).all() for a, b in zip(weights.bits, may_be[newest.number], strict=True)), newest


# --- others beside it (16, 17) ----------------------------------------------------------------------------------------


def test_of_two_trainers_the_one_that_came_first_stops(key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    first = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store")
    first.step(1)
    second = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store")
    second.step(2)
    first.trainer.mutate(3, 0.03)
    with pytest.raises(SplitBrain, match="must stop"):
        first.channel.publish(1)
    second.check()
    second.step(4)
    check_files(tmp_path, second, key, {1: second.trainer.now})
    first.close()
    second.close()


def test_files_that_a_late_joiner_reads_stay(key: bytes, files: None, model: Path, engine: ToyEngine, tmp_path: Path) -> None:
    world = World(model, [engine], where=tmp_path, key_env="FAULTY_KEY", transport="store", keep=1, anchor_every=2)
    world.step(1)
    store = WeightStore(open_store(str(tmp_path), 10), "run", key)
    root = fold.Weights(world.trainer.spec(), "run", [bits.copy() for bits in world.base]).root
    plan = chain.plan(list(store.manifests()), (0, 0), None, root)
    store.put_lease(chain.lease("late-joiner", plan, time.time(), 600.0))
    for seed in range(8):
        world.step(seed + 2)
    assert all(store.parts(step) for step in plan.steps), "they were deleted while they were read"
    kept = len(list(store.manifests()))
    store.drop_lease("late-joiner")
    world.step(20)
    world.step(21)
    assert len(list(store.manifests())) < kept + 2
    with pytest.raises(Missing):
        store.parts(plan.steps[0])
    world.close()
