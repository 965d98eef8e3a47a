"""The loop with doubles for what it drives: in which order it publishes, generates, trains and saves, also when it is stopped."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from slime import train
from slime.checkpoint.origin import Origin
from slime.checkpoint.saver import Saver
from slime.cluster.signals import StopSignal
from slime.cluster.tenancy import ENGINES, TRAINER, Tenancy, Turn
from slime.config import DataConfig, EvalSet, RolloutConfig, RunConfig, SlimeConfig
from slime.config.exits import GateStopped, NotFinite, SavedRunAgain
from slime.data.ledger import Ledger
from slime.observe.account import AccountLog, account
from slime.observe.account import read as read_account
from slime.observe.console import Console
from slime.observe.density import DensityLog
from slime.observe.metrics import MetricsLog, read
from slime.observe.trace import TraceFile
from slime.observe.trackers import Trackers
from slime.rollout.dump import read_batch
from slime.rollout.handle import Ready, RolloutResult
from slime.run import Run
from slime.types import Batch, Group, RolloutSummary, Sample, WeightVersion


@dataclass
class Flight:
    """A rollout under way that is never ready at once."""

    step: int
    world: "World"
    polls: int = 0

    def wait(self, timeout_s: float) -> bool:
        self.polls += 1
        if self.polls == 1:
            self.world.on_wait(self.step)
            return False
        self.world.flying.discard(self.step)
        return True

    def progress(self) -> int:
        return 0

    def troubles(self) -> list:
        return []

    def finished(self) -> list:
        return [f"group of rollout {self.step}"]

    def result(self) -> RolloutResult:
        assert self.step not in self.world.flying
        first = 4 * self.step
        summary = RolloutSummary(self.step, 4, first, list(range(first, first + 4)), dropped={}, metrics={}, examples=[])
        return RolloutResult(None, summary)  # type: ignore[arg-type]


@dataclass
class Probe:
    """One whose engine fails before it answers."""

    step: int
    apart: float
    polls: int = 0

    def wait(self, timeout_s: float) -> bool:
        self.polls += 1
        return self.polls > 1

    def progress(self) -> int:
        return 0

    def troubles(self) -> list:
        return [f"probe {self.step}"]

    def finished(self) -> list:
        return []

    def result(self) -> dict[str, float]:
        return {"mismatch/logprob_abs_diff": self.apart}


@dataclass
class Written:
    """Shards that are on disk at once."""

    refused: OSError | None

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float) -> dict[str, Any]:
        if self.refused is not None:
            raise self.refused
        return {}


@dataclass
class World:
    """Trainer, engines and channel at once; notes what is asked of them."""

    events: list[str] = field(default_factory=list)
    flying: set[int] = field(default_factory=set)
    metrics: dict[str, float] = field(default_factory=dict)
    on_wait: Callable[[int], None] = lambda step: None
    read: list[str] = field(default_factory=list)  # groups that the trainer was given ahead
    held: int = -1
    apart: float = 0.0  # trainer and engines, for the tokens of a probe
    reported: list[str] = field(default_factory=list)  # what host agents were told of engines
    fails_at: int | None = None  # update
    refuses: OSError | None = None  # of the disk

    def publish(self, number: int) -> dict[str, float]:
        if number == self.held:
            return {}
        assert not self.flying, f"version {number} is published under rollout {self.flying}"
        self.held = number
        self.events.append(f"publish {number}")
        return {"sync/version": float(number)}

    def expect(self, version: WeightVersion) -> None:
        assert version.number == self.held

    def start(self, step: int, first_ordinal: int) -> Flight:
        assert first_ordinal == 4 * step
        self.flying.add(step)
        self.events.append(f"rollout {step}")
        return Flight(step, self)

    def evaluate(self, step: int) -> Ready:
        assert self.held == step
        self.events.append(f"evaluate {step}")
        return Ready(step, ([], []))

    def probe_logprobs(self, ref: Any, meanwhile: Callable[[], None]) -> list[float]:
        return [-1.0]

    def probe(self, step: int, ref: Any, logprobs: list[float]) -> Probe:
        assert self.held == step == self.events.count("update") and logprobs == [-1.0], "engines and trainer hold the same weights"
        return Probe(step, self.apart)

    def read_ahead(self, groups: list) -> None:
        self.read += groups

    def update(self, ref: Any, meanwhile: Callable[[], None]) -> dict[str, float]:
        meanwhile()
        if self.fails_at == self.events.count("update"):
            raise NotFinite("the loss is nan")
        self.events.append("update")
        return dict(self.metrics)

    def save(self, directory: Path) -> "Written":
        (directory / "trainer").mkdir()
        self.events.append("save")
        return Written(self.refuses)

    def spans(self) -> list:
        return []

    def changes(self) -> list:
        return []

    def join(self) -> list:
        return []

    def tend(self) -> list:
        return []

    def engines(self, turns: list) -> None:
        pass

    def report(self, troubles: list) -> None:
        self.reported += troubles


def make_run(tmp_path: Path, world: World, mode: str = "sync", eval_every: int = 0, only: str = "all") -> Run:
    cfg = SlimeConfig(run=RunConfig(name="r", steps=3, eval_every=eval_every, only=only), rollout=RolloutConfig(mode=mode))
    cfg.data = DataConfig(eval={"e": EvalSet("e.jsonl")} if eval_every else {})
    anything: Any = world
    return Run(
        cfg=cfg,
        directory=tmp_path,
        resolved={},
        version=WeightVersion(0, 0, "abc"),
        ledger=Ledger(),
        ranks=None if only == "rollout" else anything,
        rollout=anything,
        channel=anything,
        console=Console(steps=3),
        metrics=MetricsLog(tmp_path / "metrics.jsonl"),
        account=AccountLog(tmp_path / "ledger.jsonl"),
        density=DensityLog(tmp_path / "density.jsonl"),
        trackers=Trackers([]),
        trace=TraceFile(tmp_path / "trace.json.gz"),
        signal=StopSignal(60.0),
        origin=Origin(),
        saver=Saver(tmp_path, keep_last=2, keep_every=0, timeout_s=60),
        fleet=anything,
    )


def test_one_step_off_generates_beside_the_update_and_evaluates_with_nothing_in_flight(tmp_path: Path):
    world = World()
    run = make_run(tmp_path, world, "one_step_off", eval_every=1)
    train.train(run)
    assert world.events == [
        *("publish 0", "evaluate 0", "rollout 0"),
        *("rollout 1", "update", "publish 1", "evaluate 1"),
        *("rollout 2", "update", "publish 2", "evaluate 2"),
        *("update", "publish 3", "evaluate 3"),
    ]
    assert [line.get("sync/version") for line in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_sync_publishes_what_it_has_just_trained(tmp_path: Path):
    world = World()
    train.train(make_run(tmp_path, world, eval_every=2))
    assert world.events == [
        *("publish 0", "evaluate 0", "rollout 0"),
        *("update", "publish 1", "rollout 1"),
        *("update", "publish 2", "rollout 2", "evaluate 2"),
        *("update", "publish 3", "evaluate 3"),
    ]


@dataclass
class Guest:
    """A tenant of shared devices, who says when it moves."""

    name: str
    events: list[str]

    def leave(self) -> None:
        self.events.append(f"{self.name} leaves")

    def enter(self) -> None:
        self.events.append(f"{self.name} enters")


def swapping(tmp_path: Path, world: World, **knobs: int) -> Run:
    """A run whose trainer has the memory of the shared devices, as after its start."""
    run = make_run(tmp_path, world, **knobs)
    run.tenancy = Tenancy({name: Guest(name, world.events) for name in (TRAINER, ENGINES)}, Turn(TRAINER))
    return run


def test_trainer_and_engines_have_the_memory_in_turn(tmp_path: Path):
    """Weights are published while the trainer has it, before the engines; nothing is generated or evaluated before they have it."""
    world = World()
    train.train(swapping(tmp_path, world, eval_every=2))
    there, back = ("trainer leaves", "engines enters"), ("engines leaves", "trainer enters")
    assert world.events == [
        *("publish 0", *there, "evaluate 0", "rollout 0"),
        *(*back, "update", "publish 1", *there, "rollout 1"),
        *(*back, "update", "publish 2", *there, "rollout 2", "evaluate 2"),
        *(*back, "update", "publish 3", *there, "evaluate 3"),
    ]
    lines = read(tmp_path / "metrics.jsonl")
    assert all({f"time/{move}_s" for move in ("release", "reload", "offload", "restore")} <= line.keys() for line in lines[1:])


def test_a_stop_takes_the_memory_from_engines_that_generate(tmp_path: Path):
    world = World()
    run = swapping(tmp_path, world)
    world.on_wait = lambda step: setattr(run.signal, "received", "SIGTERM" if step == 1 else None)
    with pytest.raises(SavedRunAgain, match="stopped by SIGTERM before update 2; saved at step 1"):
        train.train(run)
    assert world.events[-4:] == ["rollout 1", "engines leaves", "trainer enters", "save"]


def test_the_trainer_is_given_what_is_finished_while_a_rollout_is_waited_for(tmp_path: Path):
    world = World()
    run = make_run(tmp_path, world)
    updated: list[list[str]] = []
    world.on_wait = lambda step: updated.append(list(world.read))
    train.train(run)
    assert updated == [[f"group of rollout {step}" for step in range(n)] for n in range(3)]
    assert world.read == [f"group of rollout {step}" for step in range(3)]


def test_a_stop_in_sync_mode_saves_at_once(tmp_path: Path):
    world = World()
    run = make_run(tmp_path, world)
    world.on_wait = lambda step: setattr(run.signal, "received", "SIGTERM" if step == 1 else None)
    with pytest.raises(SavedRunAgain, match="stopped by SIGTERM before update 2; saved at step 1"):
        train.train(run)
    assert world.events[-1] == "save" and run.signal.committed == tmp_path / "iter_0000001"


def test_a_stop_one_step_off_waits_for_the_batch_of_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world, kept = World(), []
    run = make_run(tmp_path, world, "one_step_off")
    world.on_wait = lambda step: setattr(run.signal, "received", "SIGTERM" if step == 1 else None)
    monkeypatch.setattr(Run, "commit", lambda self, step, batch: kept.append((step, batch.summary.step)))
    with pytest.raises(SavedRunAgain, match="stopped by SIGTERM after update 1; saved"):
        train.train(run)
    assert kept == [(1, 1)] and not world.flying


def test_a_stop_without_a_trainer_says_what_there_is(tmp_path: Path):
    world = World()
    run = make_run(tmp_path, world, only="rollout")
    world.on_wait = lambda step: setattr(run.signal, "received", "SIGINT" if step == 2 else None)
    with pytest.raises(RuntimeError, match=r"stopped by SIGINT: rollouts before step 2 are in .*rollouts"):
        train.generate(run)


BATCH = Batch.from_groups(
    [Group(0, [Sample("1+1=", [1, 2], group=0, response_ids=[3], loss_mask=[1], rollout_logprobs=[-0.5], reward=1.0)])]
)


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of this loop are none; where one is kept, it is BATCH."""
    monkeypatch.setattr(Run, "_fetch", lambda self, batch: BATCH)


@pytest.mark.parametrize(("drift", "stops"), [(float("nan"), True), (0.6, True), (0.1, False), (None, False)])
def test_a_mismatch_that_is_too_large_or_no_number_stops_the_run(tmp_path: Path, drift: float | None, stops: bool):
    world = World(metrics={} if drift is None else {"mismatch/logprob_abs_diff": drift})
    run = make_run(tmp_path, world)
    if stops:
        with pytest.raises(GateStopped, match=r"update 1: trainer and engine log-probs differ by .* above observe\.mismatch_stop=0\.5"):
            train.train(run)
    else:
        train.train(run)
    assert len(read(tmp_path / "metrics.jsonl")) == 1 + (1 if stops else 3)
    assert (tmp_path / "stopped" / "step_0000000.npz").exists() == stops


def test_one_step_off_a_probe_shows_whether_trainer_and_engines_agree(tmp_path: Path):
    """Batches come from older weights, and would never tell."""
    run = make_run(tmp_path, World(apart=0.6), "one_step_off")
    with pytest.raises(GateStopped, match=r"update 1: trainer and engine log-probs differ by 0\.6 on average"):
        train.train(run)


def test_an_engine_that_fails_in_a_probe_is_looked_after(tmp_path: Path):
    """In that of the last update too, beside which no rollout is under way."""
    world = World()
    train.train(make_run(tmp_path, world, "one_step_off"))
    assert world.reported == ["probe 0", "probe 1", "probe 2"]


def test_a_step_that_is_not_finite_stops_the_run_and_its_batch_is_kept(tmp_path: Path):
    world = World(fails_at=2)
    run = make_run(tmp_path, world)
    with pytest.raises(NotFinite, match=r"the loss is nan\. Its batch is kept; .* run\.replay=.*stopped/step_0000002\.npz"):
        train.train(run)
    kept, summary = read_batch(tmp_path / "stopped" / "step_0000002.npz", "")
    assert summary.step == 2 and all((a == b).all() for a, b in zip(kept.columns().values(), BATCH.columns().values(), strict=True))
    assert run.step == 2 and [line.step for line in read_account(tmp_path / "ledger.jsonl")] == [1, 2]


def test_every_prompt_is_settled_once(tmp_path: Path):
    run = make_run(tmp_path, World())
    train.train(run)
    assert account(read_account(tmp_path / "ledger.jsonl")).trained == 12 == run.ledger.trained


def test_a_save_that_the_disk_refused_ends_the_run(tmp_path: Path):
    world = World(refuses=OSError(28, "No space left on device"))
    run = make_run(tmp_path, world)
    run.cfg.run.save_every = 1
    with pytest.raises(OSError, match="No space left"):
        train.train(run)
    assert run.saved == -1 and not list(tmp_path.glob("iter_???????"))
