"""A run: its directory, what it commits and records, its signals, how it ends. The driver alone owns what is durable.

    runs/<name>/  config.yaml  metrics.jsonl  examples.jsonl  density.jsonl  ledger.json  summary.json  report.html  trace.json.gz
                  logs/  iter_0000010/  latest_checkpointed_iteration.txt  rollouts/  hf/

`slime/train.py` drives it; `slime/start.py` builds it.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from slime.checkpoint import batch as batch_file
from slime.checkpoint import retention, save
from slime.checkpoint.state import DriverState, write_state
from slime.cluster import deadline
from slime.cluster.signals import StopSignal
from slime.config import SlimeConfig
from slime.config.exits import GateStopped, SavedRunAgain
from slime.data.ledger import Ledger
from slime.engine.errors import EngineLost
from slime.engine.fleet import EngineFleet
from slime.observe.console import Console
from slime.observe.density import DensityLog
from slime.observe.files import write_atomic
from slime.observe.metrics import MetricsLog, read
from slime.observe.summary import Summary, before_and_after
from slime.observe.trace import Span, TraceFile, Tracer, idle_fraction
from slime.observe.trackers import Trackers
from slime.rollout.handle import BatchSource, Pending, RolloutResult
from slime.sync.channel import Channel
from slime.trainer.group import TrainerGroup
from slime.types import WeightVersion

log = logging.getLogger(__name__)

BUSY = frozenset({"engine", "train"})  # spans in which something computes
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
    density: DensityLog
    trackers: Trackers
    trace: TraceFile
    signal: StopSignal
    fleet: EngineFleet | None = None
    restored_batch: Pending | None = None
    in_flight: Pending | None = None  # the rollout under way, until it is joined
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
    saved: int = -1  # the last committed step

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
            self._sync |= self.channel.publish(number)
            self._record_changes()
            if lost := self.channel.lost():
                raise EngineLost("; ".join(f"{engine} was lost and is fenced: {why}" for engine, why in lost.items()))
            self.rollout.expect(WeightVersion(self.version.epoch, number, self.version.run_id))
        self.published = number

    def start(self, step: int) -> Pending | None:
        """Start the rollout of `step`, unless that is past the end."""
        self.in_flight = self.rollout.start(step, self.ledger.next) if step < self.cfg.run.steps else None
        return self.in_flight

    def join(self, pending: Pending | None) -> RolloutResult:
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
        """Commit the trainer at `step` with this finished, untrained batch, where run.save_every or a stop signal asks for it."""
        every = self.cfg.run.save_every
        due = every and step > 0 and step % every == 0 and self.restored_batch is None
        self.restored_batch = None
        if due or self.signal.received:
            self.commit(step, batch)
        if self.signal.received:
            raise SavedRunAgain(f"stopped by {self.signal.received} after update {step}; saved")

    def update(self, batch: RolloutResult) -> dict[str, float]:
        """Train on a batch; returns the update's metrics."""
        with self.console.bar(f"update {self.step + 1}", None):
            return self.trainer.update(batch.ref)

    def record(self, step: int, batch: RolloutResult, metrics: dict[str, float]) -> None:
        """Everything that is kept of update `step`: metrics with the evaluation after it, samples, trace, ledger. Raises GateStopped."""
        self.version = WeightVersion(self.version.epoch, step, self.version.run_id)
        self.ledger.train(batch.summary.trained)
        line = {**batch.summary.metrics, **metrics, **self.ledger.metrics()}
        every = self.cfg.run.eval_every
        if (every and step % every == 0) or step == self.cfg.run.steps:
            line |= self._evaluate(step)
        line |= self._sync
        self._write(step, line, batch.summary.examples, batch.spans)
        self._gate(step, line)

    def evaluate_first(self) -> None:
        """Line 0: the evaluation, if there is one, of the weights that the run starts from."""
        if self.metrics.next_step == 0:
            self._write(0, self._evaluate(0), [], [])

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

    def _wait(self, pending: Pending) -> None:
        """Wait for a rollout, with a bar, and for a signal. In sync mode nothing is lost by not waiting: a resumed run draws the same
        prompts with the same weights. One step off, the batch comes from weights that a resumed run would not have: it is waited for."""
        with self.console.bar(f"rollout {pending.step + 1}", self.cfg.rollout.prompts_per_step, "prompts") as bar:
            while not pending.wait(POLL_S):
                bar.update(pending.progress())
                if self.fleet is not None:
                    self.fleet.check()
                if self.signal.received and self.cfg.rollout.mode == "sync":
                    self._stop()

    def _stop(self) -> NoReturn:
        if self.ranks is None:
            raise RuntimeError(f"stopped by {self.signal.received}: rollouts before step {self.step} are in {self.directory / 'rollouts'}")
        self.commit(self.step, None)
        raise SavedRunAgain(f"stopped by {self.signal.received} before update {self.step + 1}; saved at step {self.step}")

    def _evaluate(self, step: int) -> dict[str, float]:
        """Every evaluation set under version `step`. A rollout that is in flight under another version ends first."""
        if not self.cfg.data.eval or self.fleet is None or self.ranks is None:
            return {}
        if self.in_flight is not None and self.published != step:
            self._wait(self.in_flight)
        self.publish(step)
        begun = time.time()
        results, self._eval_spans = self.rollout.evaluate(step)
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
        write_atomic(self.directory / "ledger.json", json.dumps(self.ledger.metrics()))
        if step or "time/eval_s" in line:
            self.console.step(step, line)

    def _keep_examples(self, step: int, examples: list[dict]) -> None:
        with (self.directory / "examples.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, **example}) + "\n" for example in examples)

    def _gate(self, step: int, line: dict[str, float]) -> None:
        """Train and inference must agree on the log-probs of the same tokens under the same weights; a difference that is no number is none
        that may pass."""
        drift, observe = line.get("mismatch/logprob_abs_diff"), self.cfg.observe
        if drift is None:  # no token of the batch came from the weights that it was trained with
            if self.fleet is not None and self.ranks is not None and self.cfg.rollout.mode == "sync":
                log.warning("update %d: no sample says which weights drew it (weight_versions); mismatch is not measured", step)
            return
        if observe.mismatch_stop and not drift <= observe.mismatch_stop:
            limit = f"observe.mismatch_stop={observe.mismatch_stop:g}"
            raise GateStopped(f"update {step}: trainer and engine log-probs differ by {drift:.3g} on average, above {limit}")
        if not drift <= observe.mismatch_warn:
            limit = f"observe.mismatch_warn={observe.mismatch_warn:g}"
            log.warning("update %d: trainer and engine log-probs differ by %.3g on average, above %s", step, drift, limit)

    # --- durable ----------------------------------------------------------------------------------------------------

    def commit(self, step: int, batch: RolloutResult | None) -> Path:
        """Write iter_<step>: shards, ledger, the finished batch if there is one. Whole or not at all."""
        begun = time.time()
        with self.tracer.span("save", step=step):
            temporary = save.begin(self.directory, step)
            self.trainer.save(temporary / "trainer")
            if batch is not None:
                timeout_s = self.cfg.cluster.step_timeout_s
                batch_file.write_batch(temporary, deadline.get(batch.ref, timeout_s, "the finished batch", "cluster.step_timeout_s"))
                (temporary / "rollout.json").write_text(json.dumps(batch.summary.to_dict()))
            version = WeightVersion(self.version.epoch, step, self.version.run_id)
            write_state(temporary, DriverState(step, version, self.ledger.to_dict(), self.trackers.ids(), self.resolved, self.wall_s))
            path = save.commit(self.directory, step)
            retention.keep_newest(self.directory, self.cfg.run.keep_last)
        self.saved, self._save_s, self.signal.committed = step, time.time() - begun, path
        self.console.note(f"saved {path}")
        return path

    def finish(self) -> None:
        """The last commit and the Hugging Face directory of the final weights."""
        if self.ranks is None:
            return
        if self.saved != self.step:
            self.commit(self.step, None)
        self.trainer.export_hf(self.directory / "hf")

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
