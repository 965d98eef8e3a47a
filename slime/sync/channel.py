"""The weight channel as the driver sees it: publish a version, get it into every engine, proven, or raise."""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slime.config import SyncConfig
from slime.observe.trace import Span, Tracer
from slime.sync import transport
from slime.sync.diff import Delta, Summary
from slime.sync.manifest import DELTA, MODEL_DIRECTORY, Manifest, sign
from slime.sync.protocol import Adoption, Answer, Publisher, Receivers
from slime.sync.publication import Action, Do, Phase, Publication
from slime.sync.records import ModelSpec
from slime.types import WeightVersion

log = logging.getLogger(__name__)

MIB = 1 << 20
KEY_BYTES = 32
ENDING_S = 60.0


class NotProven(RuntimeError):
    """A version did not reach every engine; those that are not fenced hold the version before."""


class EnginesLost(NotProven):
    """No engine is left that could hold the version: their host agents bring them back, then it can be published again."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What a publication changed, for the run's record."""

    number: int
    changed: tuple[int, ...]  # elements of every tensor


class Channel:
    """See protocol.py for the order of calls."""

    def __init__(
        self,
        cfg: SyncConfig,
        publisher: Publisher | None,
        receivers: Receivers | None,
        version: WeightVersion,
        weights_dir: Path = Path("weights"),
        away: bool = False,
    ) -> None:
        """`version` gives run id and epoch. Without receivers nothing is published; without a publisher engines keep what they loaded.
        `weights_dir` is the default of sync.url. `away`: engines have no memory when a version is published (cluster.share=swap). It goes
        to their hosts, which bring them to it, proven, when they come back; see protocol.py."""
        self._cfg = cfg
        self._publisher = publisher
        self._receivers = receivers
        self._run = version
        self._away = away
        self._held: WeightVersion | None = None  # that every engine is proven to hold, or will be before it comes back
        self._broken = ""  # why nobody knows any more what engines hold
        lasting = os.environ[cfg.key_env].encode() if cfg.key_env else None
        self._key = lasting or secrets.token_bytes(KEY_BYTES)
        self._url = transport.url_of(cfg, weights_dir, version.run_id)
        self._transport = transport.make(cfg, weights_dir, version.run_id, lasting)
        self._spec: ModelSpec | None = None
        self._changed: list[Changed] = []
        self._sent: _Sent | None = None  # the delta that is on its way, or was when the last engine was lost
        self._tracer = Tracer("sync")

    def tensors(self) -> list[tuple[str, int]]:
        """Names and elements of what travels."""
        return [(tensor.name, tensor.size) for tensor in self._spec.tensors] if self._spec else []

    def open(self, between: Callable[[], object] = lambda: None) -> int:
        """Take what trainer and engines loaded from the model directory as the common base, before the trainer loads a checkpoint; the
        epoch to publish in. `between` is called when the engines have done their part and before the trainer does its own. Raises what
        `publish` raises, and ValueError for an engine that cannot be followed."""
        if self._publisher is None or self._receivers is None:
            return self._run.epoch
        self._run = replace(self._run, epoch=self._transport.claim(self._run.epoch))
        with self._tracer.span("adopt"):
            self._spec = self._publisher.spec()
            self._receivers.adopt(self._spec, Adoption(self._run.run_id, self._key, self._url), self._cfg.timeout_s)
            between()
            if self._cfg.mode == "delta":
                self._publisher.take_base(self._run.run_id)
        return self._run.epoch

    def publish(self, number: int) -> dict[str, float]:
        """Bring every engine to version `number`; returns at once where they hold it. Metrics: sync/*, time/sync_s.

        An engine that dies meanwhile is left out: its host agent brings it to the version afterwards. Raises EnginesLost where none is
        left, after which a second `publish` is right, NotProven naming engine and tensors, EngineError, TimeoutError naming
        sync.timeout_s: engines that are not fenced then hold the version before. Raises what the receivers raise where one of them is
        gone, ProcessLost: nobody knows what its engines hold, and nothing can be published any more.
        """
        version = WeightVersion(self._run.epoch, number, self._run.run_id)
        if self._broken:
            raise NotProven(f"weights {version.label} cannot be published: {self._broken}; start the run again, it resumes")
        if self._receivers is None or self._held == version:
            return {}
        if self._publisher is None:
            self._receivers.relabel(version.label, self._cfg.timeout_s)
            metrics: dict[str, float] = {}
        else:
            metrics = self._send(version, self._publisher, self._receivers)
        self._held = version
        return {"sync/version": float(number), **metrics}

    def spans(self) -> list[Span]:
        """What was published since the last call."""
        return self._tracer.drain()

    def changes(self) -> list[Changed]:
        """What the steps since the last call changed."""
        drained, self._changed = self._changed, []
        return drained

    def close(self) -> None:
        """Let go what is of no use after the run."""
        self._transport.close()

    # --- one version ------------------------------------------------------------------------------------------------

    def _send(self, version: WeightVersion, publisher: Publisher, receivers: Receivers) -> dict[str, float]:
        begun = time.perf_counter()
        offer = self._offer_delta if self._cfg.mode == "delta" else self._offer_whole
        try:
            metrics, clock = offer(version, publisher, receivers)
        except BaseException:
            self._let_go(version, receivers)
            raise
        self._broken = f"{version.label} was interrupted"
        if self._away:
            self._acknowledge(version, publisher, receivers)
            self._broken = ""
        else:
            metrics |= self._commit(version, publisher, receivers, clock)
        return {**metrics, "time/sync_s": time.perf_counter() - begun}

    def _let_go(self, version: WeightVersion, receivers: Receivers) -> None:
        """The version is not published."""
        with contextlib.suppress(RuntimeError, TimeoutError):  # of a host that is gone; what went wrong first is the reason
            receivers.give_up(version.label, ENDING_S)

    def _clock(self, version: WeightVersion) -> "_Clock":
        """It begins when the trainer has done its part."""
        return _Clock(time.perf_counter() + self._cfg.timeout_s, version, self._cfg.timeout_s)

    def _offer_delta(self, version: WeightVersion, publisher: Publisher, receivers: Receivers) -> "tuple[dict[str, float], _Clock]":
        assert self._spec is not None, "the channel is open"
        with self._tracer.span("delta", version=version.number):
            delta = publisher.delta(version, self._cfg.codec, self._cfg.bucket_mb * MIB)
        clock, offered = self._clock(version), time.perf_counter()
        manifest = self._manifest(version, delta)
        signed = sign(manifest, self._key)
        stays = signed if self._cfg.key_env else manifest  # a key that nobody has later signs nothing that stays
        self._sent = _Sent(manifest, stays, Changed(version.number, delta.summary.changed))
        with self._tracer.span("offer", version=version.number):
            receivers.offer(signed.to_json(), self._transport.send(stays, delta.parts, self._spec, clock.left()), clock.left())
        return {**self._of_delta(delta.summary, manifest), "sync/decode_s": time.perf_counter() - offered}, clock

    def _offer_whole(self, version: WeightVersion, publisher: Publisher, receivers: Receivers) -> "tuple[dict[str, float], _Clock]":
        begun, wire, first = time.perf_counter(), 0, True
        with self._tracer.span("gather", version=version.number):
            for bucket in publisher.weights(version, self._cfg.bucket_mb * MIB):
                wire += receivers.offer_bucket(bucket, first, self._cfg.timeout_s)
                first = False
            clock = self._clock(version)
            receivers.offer_whole(version.label, clock.left())
        return {"sync/wire_bytes": float(wire), "sync/ratio": 1.0, "sync/gather_s": time.perf_counter() - begun}, clock

    def _manifest(self, version: WeightVersion, delta: Delta) -> Manifest:
        """Where the same was sent before and no engine was left to prove it, what was sent: it may be durable, and is never replaced."""
        assert self._spec is not None, "the channel is open"
        epoch, number = (self._held.epoch, self._held.number) if self._held else MODEL_DIRECTORY
        made = Manifest(
            run_id=version.run_id,
            epoch=version.epoch,
            number=version.number,
            parent_epoch=epoch,
            parent_number=number,
            kind=DELTA,
            signature=self._spec.signature,
            codec=self._cfg.codec,
            part_bytes=self._cfg.bucket_mb * MIB,
            parts=delta.refs,
            fingerprints=delta.summary.fingerprints,
            parent_root=delta.summary.parent_root,
            changed=delta.summary.changed,
            created_s=time.time(),
        )
        before = self._sent.manifest if self._sent is not None else made
        return before if before == replace(made, created_s=before.created_s) else made

    def _of_delta(self, summary: Summary, manifest: Manifest) -> dict[str, float]:
        assert self._spec is not None
        elements = sum(tensor.size for tensor in self._spec.tensors)
        return {
            "sync/density": sum(summary.changed) / elements,
            "sync/dense_frac": summary.complete_blocks / sum(tensor.blocks for tensor in self._spec.tensors),
            "sync/wire_bytes": float(manifest.nbytes),
            "sync/ratio": self._spec.nbytes / max(1, manifest.nbytes),
            "sync/diff_s": summary.diff_s,
            "sync/encode_s": summary.exchange_s + summary.encode_s,
        }

    def _commit(self, version: WeightVersion, publisher: Publisher, receivers: Receivers, clock: "_Clock") -> dict[str, float]:
        """Drive the publication to its end."""
        publication, tally = Publication(receivers.engines(), heal=self._cfg.on_mismatch == "heal"), _Tally(time.perf_counter())
        due = publication.begin()
        while not publication.ended:
            if publication.phase is Phase.PREPARED:
                tally.prepared_s = time.perf_counter()
                due = publication.commit() if clock.left_s > 0 else publication.abort(clock.late)
            asked = [action for action in due if action.do not in (Do.ACKNOWLEDGE, Do.FENCE)]
            with self._tracer.span("+".join(sorted({str(action.do) for action in asked})) or "fence", version=version.number):
                answers = receivers.perform(asked, version.label, clock.of(asked)) if asked else []
            if Action(Do.ACKNOWLEDGE) in due:
                tally.committed_s = time.perf_counter()
                self._acknowledge(version, publisher, receivers)
            due = []
            for answer in answers:
                tally.add(answer)
                due += self._judge(publication, answer, version)
            if any(answer.lost for answer in answers):
                clock = self._clock(version)  # the time that it has cost is not the others'
        self._broken = ""
        if not publication.acknowledged:
            self._let_go(version, receivers)
        self._report(publication, version)
        return tally.metrics()

    def _judge(self, publication: Publication, answer: Answer, version: WeightVersion) -> list[Action]:
        """What an answer leads to."""
        action, failed = answer.action, answer.failed
        if answer.lost:
            return publication.died(action.engine, f"asked to {action.do}: {failed}")
        if not failed:
            return publication.done(action)
        if action.do is Do.COMMIT and self._cfg.on_mismatch == "heal":
            log.warning("%s: weights %s: %s; loading all of them", action.engine, version.label, failed)
        return publication.failed(action, failed)

    def _acknowledge(self, version: WeightVersion, publisher: Publisher, receivers: Receivers) -> None:
        """Every engine that is left has proven it, or none is there: the trainer's snapshot and the host copies become the version."""
        with self._tracer.span("advance", version=version.number):
            if self._cfg.mode == "delta":
                publisher.acknowledge(version)
            receivers.advance(version.label, self._cfg.timeout_s)
        sent, self._sent = self._sent, None
        if sent is not None and self._spec is not None:
            if self._held is not None:  # the first one of a process leads from the model directory, which is no step
                self._changed.append(sent.changed)
            self._transport.settle(sent.stays, lambda whole: receivers.write_anchor(whole.to_json()), self._spec)
        self._held = version

    def _report(self, publication: Publication, version: WeightVersion) -> None:
        """Raises EnginesLost where no engine is left, NotProven where it was aborted otherwise."""
        fenced = f"; fenced: {', '.join(publication.fenced)}" if publication.fenced else ""
        if publication.phase is not Phase.DONE:
            kind = EnginesLost if publication.deserted else NotProven
            raise kind(f"weights {version.label} were not published: {publication.reason}{fenced}")
        if publication.deserted:
            raise EnginesLost(f"weights {version.label}: no engine goes on: {'; '.join(publication.fenced.values())}")
        for engine, reason in publication.fenced.items():
            log.error("%s did not come to weights %s and gets no requests: %s", engine, version.label, reason)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A delta that is not acknowledged."""

    manifest: Manifest
    stays: Manifest  # as the transport has it
    changed: Changed


@dataclass
class _Tally:
    """What a publication took. Times of time.perf_counter(); those of the engines are of the slowest."""

    begun_s: float
    prepared_s: float = 0.0  # every engine had staged
    committed_s: float = 0.0  # every engine went on
    staged_bytes: int = 0
    write_s: float = 0.0
    audit_s: float = 0.0
    healed: int = 0

    def add(self, answer: Answer) -> None:
        self.staged_bytes += answer.staged_bytes
        self.write_s, self.audit_s = max(self.write_s, answer.write_s), max(self.audit_s, answer.audit_s)
        self.healed += answer.action.do is Do.HEAL and not answer.failed

    def metrics(self) -> dict[str, float]:
        return {
            "sync/stage_s": self.prepared_s - self.begun_s,
            "sync/staged_bytes": float(self.staged_bytes),
            "sync/pause_s": self.committed_s - self.prepared_s,
            "sync/commit_s": self.write_s,
            "sync/verify_s": self.audit_s,
            "sync/healed": float(self.healed),
        }


@dataclass(frozen=True)
class _Clock:
    """The deadline of a publication."""

    deadline: float  # time.perf_counter()
    version: WeightVersion
    timeout_s: float

    @property
    def left_s(self) -> float:
        return self.deadline - time.perf_counter()

    @property
    def late(self) -> str:
        return f"publishing weights {self.version.label}: not in every engine after {self.timeout_s:g} s (sync.timeout_s)"

    def left(self) -> float:
        """Raises TimeoutError where nothing is."""
        if (left := self.left_s) <= 0:
            raise TimeoutError(self.late)
        return left

    def of(self, actions: Sequence[Action]) -> float:
        """For these: what ends a publication, well or not, has time of its own."""
        if actions[0].do in (Do.PREPARE, Do.COMMIT):
            return max(0.1, self.left_s)
        return max(min(ENDING_S, self.timeout_s), self.left_s)
