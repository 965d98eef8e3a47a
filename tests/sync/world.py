"""A trainer and toy engines under a weight channel, into which tests/sync/test_faults_*.py put faults; docs/faults.md has the list.

Every case ends with engines that hold, bit for bit, a version that was committed, or with an error that has a name and engines that get no
requests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.engine.live import LiveEngine
from slime.sync import native
from slime.sync.kernels.scatter import Scatter, unsigned
from slime.sync.manifest import Manifest
from slime.sync.publication import Action, Do, Phase, Publication
from tests.engine.weights_double import Bits, Host
from tests.sync import toy_engine
from tests.sync.faulty import Fleet, open_channel, recipe


class World:
    """A trainer, a channel, and a host for each engine."""

    def __init__(
        self, model: Path, engines: list[Any], epoch: int = 0, run_id: str = "run", where: Path = Path("none"), **sync: Any
    ) -> None:
        self.engines, self.model = engines, model
        self.cfg = recipe(model, engines[0].ranks, **sync)
        self.trainer = Bits(model)
        self.base = self.trainer.copied()
        self.fleet = Fleet([Host(recipe(model, engine.ranks, **sync), [engine]) for engine in engines])
        self.channel = open_channel(self.cfg, self.trainer, self.fleet, epoch, run_id, where)
        self.number, self.label = -1, f"{run_id}/{self.channel._run.epoch}/"

    def close(self) -> None:
        for host in self.fleet.hosts:
            host.close()

    def step(self, seed: int, share: float = 0.03) -> None:
        """Other weights, published."""
        self.trainer.mutate(seed, share)
        self.publish()

    def publish(self) -> None:
        self.number += 1
        self.channel.publish(self.number)
        self.check()

    def check(self, bits: list[Any] | None = None) -> None:
        """All engines go on, with these bits and the label of the last version."""
        for engine in self.engines:
            assert engine.holds(self.trainer.now if bits is None else bits)
            assert not engine.paused and not engine.session
            assert bits is not None or engine.label == f"{self.label}{self.number}"


def take(world: World, manifest: str, parts: list[bytes]) -> None:
    """Offer a version and drive it to its end, as a channel does. Raises what the offer raised."""
    world.fleet.offer(manifest, parts, 10)
    label = Manifest.from_json(manifest).label
    publication = Publication(world.fleet.engines())
    due = publication.begin()
    while not publication.ended:
        due = publication.commit() if publication.phase is Phase.PREPARED else due
        answers = world.fleet.perform([a for a in due if a.do is not Do.ACKNOWLEDGE], label, 10)
        if Action(Do.ACKNOWLEDGE) in due:
            world.fleet.advance(label, 10)
        due = [a for answer in answers for a in (publication.failed if answer.failed else _done(publication))(answer.action, *_why(answer))]
    assert publication.phase is Phase.DONE, publication.reason


def _done(publication: Publication) -> Callable[..., list[Action]]:
    return lambda action: publication.done(action)


def _why(answer: Any) -> list[str]:
    return [answer.failed] if answer.failed else []


def restart(world: World, number: int) -> None:
    """What the agent does with an engine whose process has ended."""
    host, engine = world.fleet.hosts[number], world.engines[number]
    engine.start()
    host.live = [LiveEngine(engine.spec.endpoint, engine.ranks, host._session, engine)]
    host.run(host.weights.take_in(host.live[0]))


class Writes:
    """Scatters of the model's ranks that fail, half done: the next `times` ones of `rank`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.times, self.error = 1, 0, RuntimeError("no memory")
        self.failed = 0
        write, writes = Scatter.write, self

        def fails(scatter: Scatter) -> None:
            if writes.times and toy_engine.this_rank() == writes.rank:
                writes.times -= 1
                writes.failed += 1
                half = scatter.segments[: max(1, len(scatter.segments) // 2)]
                native.scatter(half, unsigned(scatter.index), unsigned(scatter.bits))
                raise writes.error
            write(scatter)

        monkeypatch.setattr(Scatter, "write", fails)
