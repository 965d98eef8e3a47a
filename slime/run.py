"""A run: its directory, what it commits and records, its signals, how it ends. The driver alone owns what is durable.

    runs/<name>/  config.yaml  metrics.jsonl  examples.jsonl  density.jsonl  ledger.jsonl  summary.json  report.html  trace.json.gz
                  logs/  iter_0000010/  latest_checkpointed_iteration.txt  rollouts/  stopped/  hf/

`slime/train.py` drives it; `slime/start.py` builds it.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from slime.checkpoint import batch as batch_file
from slime.checkpoint import save
from slime.checkpoint.origin import Origin
from slime.checkpoint.saver import Committed, Saver
from slime.checkpoint.state import DriverState, write_state
from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB
from slime.cluster.signals import StopSignal
from slime.cluster.tenancy import ENGINES, TRAINER, Tenancy
from slime.config import SlimeConfig
from slime.config.exits import GateStopped, NotFinite, SavedRunAgain
from slime.data.ledger import Ledger
from slime.engine.fleet import EngineFleet
from slime.observe.account import AccountLog, Settled
from slime.observe.console import Console
from slime.observe.density import DensityLog
from slime.observe.hashed import write_hashed
from slime.observe.metrics import MetricsLog, read
from slime.observe.summary import Summary, before_and_after
from slime.observe.trace import Span, TraceFile, Tracer, idle_fraction
from slime.observe.trackers import Trackers
from slime.rollout.dump import replay_command, write_stopped
from slime.rollout.handle import BatchSource, Pending, Ready, RolloutResult
from slime.sync.channel import Channel, EnginesLost
from slime.trainer.group import TrainerGroup
from slime.types import Batch, WeightVersion

log = logging.getLogger(__name__)

BUSY = frozenset({"engine", "train", "held_teacher", "critic"})  # spans in which something computes
SETTLE_S = 300.0  # for a save in flight when a run fails
POLL_S = 0.2  # how often a wait looks at its progress bar and for a stop


@dataclass
class Run:
    """Everything a loop needs. Built by `slime.start.open_run`, which also ends all of it."""

    cfg: SlimeConfig
    directory: Path
    resolved: dict  # the recipe as plain values, for checkpoints
    version: WeightVersion  # of the weights that the trainer holds
    ledger: Ledger
    ranks: TrainerGroup | None  # None with run.only=rollout
    rollout: BatchSource
    channel: Channel
    console: Console
    metrics: MetricsLog
    account: AccountLog
    density: DensityLog
    trackers: Trackers
    trace: TraceFile
    signal: StopSignal
    saver: Saver
    origin: Origin  # code and data, for checkpoints
    begins_from: Path | None = None  # the checkpoint of another run
    fleet: EngineFleet | None = None
    tenancy: Tenancy = field(default_factory=Tenancy)  # of devices that ranks and engines have in turn
    restored_batch: Pending[RolloutResult] | None = None
    in_flight: Pending[RolloutResult] | None = None  # the rollout under way, until it is joined
    published: int = -1  # the version that engines hold
    wall_before_s: float = 0.0  # spent by earlier parts of the run
    tracer: Tracer = field(default_factory=lambda: Tracer("driver"))
    begun_s: float = field(default_factory=time.time)
    _step_begun_s: float = field(default_factory=time.time)
    _sync: dict[str, float] = field(default_factory=dict)  # of what was published since the last record
    _save_s: float = 0.0
    _eval_spans: list[Span] = field(default_factory=list)
    _recent: list[Span] = field(default_factory=list)  # of the last record
    _joins: tuple[float, float] | None = None  # when the last two batches were joined; all work in between has been recorded
    _joined_s: float | None = None
    saved: int = -1  # the last step that is durable
    _save_begun: int = -1  # the last step of which a save has begun

    def __post_init__(self) -> None:
        self._save_begun = self.saved

    @property
    def trainer(self) -> TrainerGroup:
        assert self.ranks is not None, "run.only=rollout has no trainer"
        return self.ranks

    @property
    def step(self) -> int:
        """Completed updates of the trainer."""
        return self.version.number

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run, over all restarts."""
        return self.wall_before_s + time.time() - self.begun_s

    # --- the loop's verbs -------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The updates still to do."""
        return iter(range(self.step, self.cfg.run.steps))

    def publish(self, number: int) -> None:
        """Bring every engine to version `number`, proven. Returns at once where they hold it."""
        with self.tracer.span("publish", version=number):
            if self.fleet is not None:
                self._take_in(self.fleet)
            self._sync |= self._published(number) | self.tenancy.have(ENGINES)
            self._record_changes()
            self._tend()
            self.rollout.expect(WeightVersion(self.version.epoch, number, self.version.run_id))
        self.published = number

    def _published(self, number: int) -> dict[str, float]:
        """Publish, again once engines are back where none was left that could hold the version."""
        while True:
            try:
                return self.channel.publish(number)
            except EnginesLost as lost:
                assert self.fleet is not None
                log.warning("%s; it is published again once an engine is back", lost)
                self.fleet.wait_for_engines(self.cfg.rollout.start_timeout_s + self.cfg.sync.timeout_s)

    def _tend(self, pending: Pending[Any] | None = None) -> None:
        """Let host agents and rollout manager know of one another's engines; to be called often while anything is waited for."""
        if self.fleet is not None:
            if pending is not None:
                self.fleet.report(pending.troubles())
            self.rollout.engines(self.fleet.tend())

    def start(self, step: int) -> Pending[RolloutResult] | None:
        """Start the rollout of `step`, unless that is past the end."""
        self.in_flight = self.rollout.start(step, self.ledger.begin(step)) if step < self.cfg.run.steps else None
        return self.in_flight

    def join(self, pending: Pending[RolloutResult] | None) -> RolloutResult:
        """Wait for a rollout; nothing of it is in flight afterwards. A stop signal meanwhile commits and ends the run."""
        assert pending is not None, "a rollout past the last step"
        self._wait(pending)
        self.in_flight = None
        result = pending.result()
        joined_s = time.time()
        self._joins = (self._joined_s, joined_s) if self._joined_s is not None else None
        self._joined_s = joined_s
        if pending is not self.restored_batch:
            self.ledger.record(result.summary)
        return result

    def commit_if_due(self, step: int, batch: RolloutResult) -> None:
        """Begin to save the trainer at `step` with this finished, untrained batch, where run.save_every asks for it. A stop signal saves
        too, waits until that is durable and ends the run."""
        every = self.cfg.run.save_every
        due = every and step > 0 and step % every == 0 and self.restored_batch is None
        self.restored_batch = None
        if due or self.signal.received:
            self.commit(step, batch)
        if self.signal.received:
            self._leave(f"stopped by {self.signal.received} after update {step}; saved")

    def update(self, batch: RolloutResult) -> dict[str, float]:
        """Train on a batch; returns the update's metrics. Raises NotFinite, with the batch kept for run.replay."""
        self._sync |= self.tenancy.have(TRAINER)
        with self.console.bar(f"update {self.step + 1}", None):
            try:
                probe = self._probe(batch)
                metrics = self.trainer.update(batch.ref, self._look_beside)
                while not probe.wait(POLL_S):
                    probe.progress()
                    self._look_after(probe)
                return {**probe.result(), **metrics}
            except NotFinite as error:
                raise NotFinite(f"{error}. {self._keep_stopped(self.step, batch, str(error))}") from error

    def _probe(self, batch: RolloutResult) -> Pending[dict[str, float]]:
        """One step off, trainer and engines hold the same weights before an update, and the batch, from older ones, cannot show whether
        they agree: both are asked about its first tokens."""
        if self.cfg.rollout.mode == "sync" or self.fleet is None:
            return Ready(self.step, {})
        return self.rollout.probe(self.step, batch.ref, self.trainer.probe_logprobs(batch.ref, self._look_beside))

    def record(self, step: int, batch: RolloutResult, metrics: dict[str, float]) -> None:
        """Everything that is kept of update `step`: metrics with the evaluation after it, samples, trace, ledger. Raises GateStopped, and
        what a save in flight has raised."""
        self.version = WeightVersion(self.version.epoch, step, self.version.run_id)
        self.ledger.train(batch.summary.trained)
        line = {**batch.summary.metrics, **metrics, **self.ledger.metrics()}
        every = self.cfg.run.eval_every
        if (every and step % every == 0) or step == self.cfg.run.steps:
            line |= self._evaluate(step)
        line |= self._sync
        self._write(step, line, batch.summary.examples, batch.spans)
        self.account.append(Settled(step, batch.summary.trained, batch.summary.dropped))
        self._landed(self.saver.poll())
        self._gate(step, line, batch)

    def evaluate_first(self) -> None:
        """Line 0: the evaluation, if there is one, of the weights that the run starts from, and how they were published."""
        if self.metrics.next_step == 0:
            self._write(0, self._evaluate(0) | self._sync, [], [])

    def _take_in(self, fleet: EngineFleet) -> None:
        """Engines that have come late: caught up and proven, they take part from here on."""
        for endpoint in fleet.join():
            self.rollout.add(endpoint)
            self.console.note(f"{endpoint.name} at {endpoint.url} joins")

    def _record_changes(self) -> None:
        """What the versions that were published changed, tensor by tensor."""
        for change in self.channel.changes():
            if change.number > self.density.last_step:
                self.density.append(change.number, change.changed, self.channel.tensors())

    # --- what the verbs do ------------------------------------------------------------------------------------------

    def _wait(self, pending: Pending[RolloutResult]) -> None:
        """Wait for a rollout, with a bar, and for a signal. In sync mode nothing is lost by not waiting: a resumed run draws the same
        prompts with the same weights. One step off, the batch comes from weights that a resumed run would not have: it is waited for."""
        with self.console.bar(f"rollout {pending.step + 1}", self.cfg.rollout.prompts_per_step, "prompts") as bar:
            while not pending.wait(POLL_S):
                bar.update(pending.progress())
                if self.ranks is not None:
                    self.ranks.read_ahead(pending.finished())
                self._look_after(pending)
                if self.signal.received and self.cfg.rollout.mode == "sync":
                    self._stop()

    def _look_beside(self) -> None:
        """What goes on beside an update."""
        if self.in_flight is not None:
            self.in_flight.progress()
        self._tend(self.in_flight)
        self._landed(self.saver.poll())

    def _look_after(self, pending: Pending[Any]) -> None:
        """What goes on beside a wait: engines that fail and come back, a save that ends, Ray itself."""
        deadline.check()
        self._tend(pending)
        self._landed(self.saver.poll())

    def _stop(self) -> NoReturn:
        self.ledger.abandon()
        if self.ranks is None:
            raise RuntimeError(f"stopped by {self.signal.received}: rollouts before step {self.step} are in {self.directory / 'rollouts'}")
        if self._save_begun != self.step:
            self.commit(self.step, None)
        self._leave(f"stopped by {self.signal.received} before update {self.step + 1}; saved at step {self.step}")

    def _leave(self, said: str) -> NoReturn:
        self._wait_for_save()
        self.signal.leave()
        raise SavedRunAgain(said)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Every evaluation set under version `step`. A rollout that is in flight under another version ends first."""
        if not self.cfg.data.eval or self.fleet is None or self.ranks is None:
            return {}
        if self.in_flight is not None and self.published != step:
            self._wait(self.in_flight)
        self.publish(step)
        begun = time.time()
        evaluation = self.rollout.evaluate(step)
        while not evaluation.wait(POLL_S):
            evaluation.progress()
            self._look_after(evaluation)
        results, self._eval_spans = evaluation.result()
        self._keep_examples(step, [{**e, "source": f"eval/{r.name}"} for r in results for e in r.examples])
        line = {f"eval/{r.name}/{name}": value for r in results for name, value in r.metrics.items()}
        return {**line, "time/eval_s": time.time() - begun}

    def _write(self, step: int, line: dict[str, float], examples: list[dict], spans: list[Span]) -> None:
        now = time.time()
        self.tracer.add("step", self._step_begun_s, now, step=step)
        spans = [*spans, *self._eval_spans, *(self.ranks.spans() if self.ranks else []), *self.channel.spans(), *self.tracer.drain()]
        if step:
            line["time/save_s"] = self._save_s
        if self._joins is not None and self._joins[1] > self._joins[0]:
            line["time/idle_frac"] = idle_fraction([*self._recent, *spans], self._joins, BUSY)
        self._recent = spans
        line["time/step_s"] = now - self._step_begun_s
        self._step_begun_s, self._save_s, self._eval_spans, self._sync = now, 0.0, [], {}
        self.metrics.append(step, line)
        self.trackers.log(step, line)
        self.trace.append(step, spans)
        self._keep_examples(step, examples)
        if step or "time/eval_s" in line:
            self.console.step(step, line)

    def _keep_examples(self, step: int, examples: list[dict]) -> None:
        with (self.directory / "examples.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, **example}) + "\n" for example in examples)

    def _gate(self, step: int, line: dict[str, float], batch: RolloutResult) -> None:
        """Train and inference must agree on the log-probs of the same tokens under the same weights; a difference that is no number is none
        that may pass."""
        drift, observe = line.get("mismatch/logprob_abs_diff"), self.cfg.observe
        if drift is None:  # no token of the batch came from the weights that it was trained with
            if self.fleet is not None and self.ranks is not None and self.cfg.rollout.mode == "sync":
                log.warning("update %d: no sample says which weights drew it (weight_versions); mismatch is not measured", step)
            return
        if observe.mismatch_stop and not drift <= observe.mismatch_stop:
            limit = f"observe.mismatch_stop={observe.mismatch_stop:g}"
            said = f"update {step}: trainer and engine log-probs differ by {drift:.3g} on average, above {limit}"
            raise GateStopped(f"{said}. {self._keep_stopped(step - 1, batch, said)}")
        if not drift <= observe.mismatch_warn:
            limit = f"a tenth of observe.mismatch_stop={observe.mismatch_stop:g}"
            log.warning("update %d: trainer and engine log-probs differ by %.3g on average, above %s", step, drift, limit)

    def _keep_stopped(self, step: int, batch: RolloutResult, reason: str) -> str:
        """Keep the batch that stops the run; where it is, and how it is trained on alone from the last checkpoint, once that is durable."""
        self.settle()
        path = write_stopped(self.directory, step, self._fetch(batch), batch.summary, reason)
        durable = None if self.saved < 0 else self.saved
        return f"Its batch is kept; from the last checkpoint it is trained alone by: {replay_command(path, self.directory, durable)}"

    def _fetch(self, batch: RolloutResult) -> Batch:
        return deadline.get(batch.ref, self.cfg.cluster.step_timeout_s, "the finished batch", STEP_KNOB)

    # --- durable ----------------------------------------------------------------------------------------------------

    def commit(self, step: int, batch: RolloutResult | None) -> None:
        """Begin to write iter_<step>: shards, ledger, the finished batch if there is one. Whole or not at all. Returns once the ranks hold
        what they write, which a later look at `saver` finds durable."""
        self._sync |= self.tenancy.have(TRAINER)
        begun = time.time()
        version = WeightVersion(self.version.epoch, step, self.version.run_id)
        state = DriverState(step, version, self.ledger.to_dict(), self.trackers.ids(), self.resolved, self.wall_s, self.origin)

        def write_rest(folder: Path) -> None:
            if batch is not None:
                batch_file.write_batch(folder, self._fetch(batch))
                write_hashed(folder / "rollout.json", json.dumps(batch.summary.to_dict()).encode())
            write_state(folder, state)

        with self.tracer.span("save", step=step):
            self.saver.start(step, self.trainer.save, write_rest)
        self._save_begun, self._save_s = step, time.time() - begun

    def _landed(self, commits: list[Committed]) -> None:
        for commit in commits:
            self.saved, self.signal.committed = commit.step, commit.path
            self.console.note(f"saved {commit.path} ({commit.seconds:.1f} s)")

    def _wait_for_save(self) -> None:
        self._landed(self.saver.wait(self.cfg.cluster.step_timeout_s, STEP_KNOB))

    def settle(self) -> None:
        """The run is to end: let a save in flight come to its end, where it can."""
        try:
            self._landed(self.saver.wait(min(SETTLE_S, self.cfg.cluster.step_timeout_s), "the end of the run"))
        except (RuntimeError, OSError) as error:
            log.warning("the save that was in flight is lost: %s", error)

    def finish(self) -> None:
        """The last commit and the Hugging Face directory of the final weights."""
        if self.ranks is None:
            return
        if self._save_begun != self.step:
            self.commit(self.step, None)
        self.tenancy.have(TRAINER)
        self.trainer.export_hf(self.directory / "hf")
        self._wait_for_save()

    def summary(self, status: str, reason: str = "") -> Summary:
        """How the run ended, with the paths that exist."""
        before, after = before_and_after(read(self.metrics.path))
        candidates = {
            "report": "report.html",
            "model": "hf",
            "checkpoint": save.iteration(self.directory, self.saved).name,
            "rollouts": "rollouts",
            "metrics": "metrics.jsonl",
        }
        paths = {name: str(self.directory / p) for name, p in candidates.items() if name == "report" or (self.directory / p).exists()}
        return Summary(status, self.step, self.wall_s, before, after, paths, reason)
