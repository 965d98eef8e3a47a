"""The channel's order of calls, and what it does when one fails. Doubles stand for ranks and engines."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from slime.config import SyncConfig
from slime.sync import transport
from slime.sync.channel import Channel, EnginesLost, NotProven
from slime.sync.diff import Delta, Summary
from slime.sync.manifest import Manifest, PartRef, root_of, verify
from slime.sync.protocol import Adoption, Answer
from slime.sync.publication import Action, Do
from slime.sync.records import ModelSpec, TensorSpec
from slime.types import WeightVersion

VERSION = WeightVersion(epoch=2, number=0, run_id="r")
SPEC = ModelSpec((TensorSpec("w", (4, 2), "float32"), TensorSpec("norm", (2,), "float32")))


@dataclass
class Log:
    """Publisher and receivers that write down what happens. `fails` is what fails: a call's name, or an action as "commit e1"."""

    fails: str = ""
    names: tuple[str, ...] = ("e0", "e1")
    calls: list[Any] = field(default_factory=list)
    manifests: list[Manifest] = field(default_factory=list)
    key: bytes = b""
    parts: list[str] = field(default_factory=lambda: ["ref"])  # what a transport has for agents beside the manifest
    step: int = 0  # makes every version another one

    def _log(self, *call: Any) -> None:
        self.calls.append(" ".join(map(str, call)))
        if call[0] == self.fails:
            raise RuntimeError(f"{self.fails} failed")

    # --- the trainer

    def spec(self) -> ModelSpec:
        return SPEC

    def take_base(self, run_id: str) -> list[int]:
        self._log("base", run_id)
        return [0, 0]

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        self._log("delta", version.label, codec, part_bytes)
        payload = f"part {version.label}".encode()
        summary = Summary((self.step + 1, 7), root_of((self.step, 7)), (3, 0), 1, 0.1, 0.2, 0.3)
        return Delta(["ref"], (PartRef.of(0, payload),), summary)

    def acknowledge(self, version: WeightVersion) -> None:
        self._log("acknowledge", version.label)
        self.step += 1

    def weights(self, version: WeightVersion, bucket_bytes: int) -> Iterator[Any]:
        for k in range(3):
            self._log("gather", k)
            yield k

    # --- the engines

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        self._log("adopt", spec.signature == SPEC.signature, run.run_id)
        self.key = run.key

    def engines(self) -> list[str]:
        return list(self.names)

    def offer(self, manifest: str, parts: Sequence[Any], timeout_s: float) -> None:
        assert 0 < timeout_s <= 10 and list(parts) == self.parts
        self.manifests.append(Manifest.from_json(manifest))
        self._log("offer", self.manifests[-1].label)

    def offer_bucket(self, bucket: Any, first: bool, timeout_s: float) -> int:
        assert first == (bucket == 0)
        self._log("bucket", bucket)
        return 100

    def offer_whole(self, label: str, timeout_s: float) -> None:
        self._log("whole", label)

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        self._log("perform", ", ".join(f"{a.do} {a.engine}" for a in actions))
        return [Answer(a, "it does not" if f"{a.do} {a.engine}" == self.fails else "", 0.25, 0.5, 100) for a in actions]

    def advance(self, label: str, timeout_s: float) -> None:
        self._log("advance", label)

    def give_up(self, label: str, timeout_s: float) -> None:
        self._log("give_up", label)

    def write_anchor(self, manifest: str) -> None:
        raise AssertionError("objects of Ray keep no history")

    def relabel(self, label: str, timeout_s: float) -> None:
        self._log("relabel", label)


def channel(log: Log | None, receivers: Log | None, weights_dir: Path = Path("weights"), **knobs: Any) -> Channel:
    return Channel(SyncConfig(bucket_mb=4, timeout_s=10, **knobs), log, receivers, VERSION, weights_dir)


def opened(log: Log, **knobs: Any) -> Channel:
    made = channel(log, log, **knobs)
    assert made.open() == 2
    log.calls.clear()
    return made


def test_the_base_is_taken_before_anything_is_published() -> None:
    log = Log()
    channel(log, log).open()
    assert log.calls == ["adopt True r", "base r"]
    whole = Log()
    channel(whole, whole, mode="full").open()
    assert whole.calls == ["adopt True r"], "no snapshot is kept for loads of everything"


def away(log: Log) -> Channel:
    return Channel(SyncConfig(bucket_mb=4, timeout_s=10), log, log, VERSION, away=True)


def test_engines_that_are_away_are_asked_nothing_and_their_hosts_become_the_version() -> None:
    log = Log(names=())
    made = away(log)
    assert made.open(lambda: log._log("between")) == 2
    metrics = made.publish(5)
    assert log.calls == [
        "adopt True r",
        "between",
        "base r",
        f"delta r/2/5 steps {4 << 20}",
        "offer r/2/5",
        "acknowledge r/2/5",
        "advance r/2/5",
    ]
    assert metrics["sync/version"] == 5 and metrics["time/sync_s"] > 0 and "sync/pause_s" not in metrics
    assert made.publish(5) == {}
    made.publish(6)
    assert [(m.parent, m.order) for m in log.manifests] == [((-1, -1), (2, 5)), ((2, 5), (2, 6))]


@pytest.mark.parametrize("fails", ["acknowledge", "advance"])
def test_where_a_host_did_not_become_the_version_nothing_is_published_any_more(fails: str) -> None:
    log = Log(names=(), fails=fails)
    made = away(log)
    made.open()
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        made.publish(5)
    with pytest.raises(NotProven, match="r/2/5 was interrupted"):
        made.publish(5)


def test_order_and_metrics() -> None:
    log = Log()
    made = opened(log)
    metrics = made.publish(5)
    assert log.calls == [
        f"delta r/2/5 steps {4 << 20}",
        "offer r/2/5",
        "perform prepare e0, prepare e1",
        "perform commit e0, commit e1",
        "perform resume e0, resume e1",
        "acknowledge r/2/5",
        "advance r/2/5",
    ]
    wire = len(b"part r/2/5")
    assert metrics["sync/version"] == 5 and metrics["sync/wire_bytes"] == wire and metrics["sync/ratio"] == 40 / wire
    assert (
        metrics["sync/density"] == 0.3
        and metrics["sync/dense_frac"] == 0.5
        and metrics["sync/staged_bytes"] == 600
        and metrics["sync/healed"] == 0
    )
    assert (metrics["sync/diff_s"], metrics["sync/encode_s"]) == (0.1, 0.5)
    assert (metrics["sync/commit_s"], metrics["sync/verify_s"]) == (0.25, 0.5)
    assert metrics["time/sync_s"] >= metrics["sync/pause_s"] > 0
    assert [span.name for span in made.spans()] == [
        "adopt",
        "delta",
        "offer",
        "prepare",
        "commit",
        "resume",
        "advance",
    ] and made.spans() == []


def test_versions_are_signed_and_lead_from_one_to_the_next() -> None:
    log = Log()
    made = opened(log)
    made.publish(5)
    made.publish(6)
    assert [(m.parent, m.order) for m in log.manifests] == [((-1, -1), (2, 5)), ((2, 5), (2, 6))]
    assert log.manifests[1].parent_root == log.manifests[0].root
    for manifest in log.manifests:
        verify(manifest, log.key)
    assert [(c.number, c.changed) for c in made.changes()] == [(6, (3, 0))], "what leads from the model directory is no step"


def test_a_version_that_is_held_is_not_sent_again() -> None:
    log = Log()
    made = opened(log)
    made.publish(5)
    count = len(log.calls)
    assert made.publish(5) == {} and len(log.calls) == count
    made.publish(6)
    assert len(log.calls) == 2 * count


def test_all_tensors_are_offered_with_mode_full() -> None:
    log = Log()
    metrics = opened(log, mode="full").publish(5)
    assert log.calls[:4] == ["gather 0", "bucket 0", "gather 1", "bucket 1"] and log.calls[6] == "whole r/2/5"
    assert log.calls[-1] == "advance r/2/5" and not any(call.startswith("acknowledge") for call in log.calls)
    assert metrics["sync/wire_bytes"] == 300 and "sync/density" not in metrics


@pytest.mark.parametrize("fails", ["prepare e1", "commit e1"])
def test_an_engine_that_fails_leaves_all_at_the_version_before(fails: str) -> None:
    log = Log()
    made = opened(log)
    made.publish(5)
    log.calls.clear()
    log.fails = fails
    with pytest.raises(NotProven, match=rf"weights r/2/6 were not published: e1: {fails.split()[0]} failed: it does not"):
        made.publish(6)
    assert not any(call.startswith(("acknowledge", "advance")) for call in log.calls)
    assert ("drop e0" if "prepare" in fails else "undo e0") in " ".join(log.calls)
    assert made.publish(5) == {}, "they hold it"
    log.fails = ""
    made.publish(6)
    assert log.manifests[-1].parent == (2, 5)


def test_a_mismatch_is_healed_where_that_is_wanted() -> None:
    log = Log(fails="commit e1")
    metrics = opened(log, on_mismatch="heal").publish(5)
    assert "perform heal e1" in log.calls and log.calls[-1] == "advance r/2/5"
    assert metrics["sync/healed"] == 1


def test_an_engine_that_cannot_be_brought_back_is_fenced_and_named() -> None:
    class Worse(Log):
        def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
            return [Answer(a, "gone" if a.engine == "e1" and a.do in (Do.COMMIT, Do.UNDO) else "") for a in actions]

    log = Worse()
    with pytest.raises(NotProven, match=r"e1: commit failed: gone; fenced: e1"):
        opened(log).publish(5)


@dataclass
class Dying(Log):
    """The engines `dying` are lost when they are asked to do `when`."""

    when: str = ""
    dying: tuple[str, ...] = ()

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        self._log("perform", ", ".join(f"{a.do} {a.engine}" for a in actions))
        dead = [a.do == self.when and a.engine in self.dying for a in actions]
        return [Answer(a, "signal 9" if lost else "", lost=lost) for a, lost in zip(actions, dead, strict=True)]

    def write_anchor(self, manifest: str) -> None:
        self._log("anchor", Manifest.from_json(manifest).label)  # which never comes


@pytest.mark.parametrize("when", ["prepare", "commit", "resume"])
def test_an_engine_that_dies_is_left_out_and_the_others_get_the_version(when: str, caplog: pytest.LogCaptureFixture) -> None:
    log = Dying(when=when, dying=("e1",))
    made = opened(log)
    assert made.publish(5)["sync/version"] == 5 and log.calls[-1] == "advance r/2/5"
    assert f"e1 did not come to weights r/2/5 and gets no requests: e1: it died: asked to {when}: signal 9" in caplog.text
    assert "perform resume e0" in " ".join(log.calls) and made.publish(5) == {}


@pytest.mark.parametrize("by", ["ray", "host", "store"])
@pytest.mark.parametrize("when", ["prepare", "commit", "resume"])
def test_without_any_engine_the_version_can_be_published_again(
    when: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it was committed before the last one died, they come back with it. With files, what is there already is the version."""
    payloads = {f"part r/2/{number}".encode() for number in (5, 6, 7)}
    monkeypatch.setattr(transport.deadline, "get", lambda refs, *_: [p for p in payloads if p.endswith(str(sent[-1]).encode())])
    sent, clock = [5], iter(range(1000, 9000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    log = Dying(parts=["ref"] if by == "ray" else [])
    made = opened(log, transport=by, keep=2, weights_dir=tmp_path)
    made.publish(5)
    sent.append(6)
    log.when, log.dying = when, ("e0", "e1")
    log.calls.clear()
    with pytest.raises(EnginesLost, match=rf"weights r/2/6.* e0: it died: asked to {when}: signal 9; e1: it died"):
        made.publish(6)
    committed = when == "resume"
    assert ("advance r/2/6" in log.calls) == committed and ("give_up r/2/6" in log.calls) == (not committed)
    log.when = ""
    if committed:
        assert made.publish(6) == {}
    else:
        assert made.publish(6)["sync/version"] == 6 and log.manifests[-1].parent == (2, 5)
        assert log.manifests[-1] == log.manifests[-2], "one version has one manifest"
    sent.append(7)
    made.publish(7)
    assert log.manifests[-1].parent == (2, 6) and [change.number for change in made.changes()] == [6, 7]
    if by != "ray":
        known = made._transport._known
        assert [manifest.number for manifest in known] == ([7] if by == "host" else [5, 6, 7])
    made.close()
    assert not caplog.records


def test_without_any_engine_from_the_beginning() -> None:
    log = Dying(names=())
    with pytest.raises(EnginesLost, match="weights r/2/5 were not published: no engine is left: none took part"):
        opened(log).publish(5)
    assert log.calls[-1] == "give_up r/2/5"


def test_an_engine_that_fails_its_proof_ends_it_though_another_one_dies() -> None:
    class Both(Dying):
        def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
            answers = super().perform(actions, label, timeout_s)
            return [Answer(a.action, "other bits") if a.action == Action(Do.COMMIT, "e0") else a for a in answers]

    with pytest.raises(NotProven, match="e0: commit failed: other bits; fenced: e1") as raised:
        opened(Both(when="commit", dying=("e1",))).publish(5)
    assert not isinstance(raised.value, EnginesLost)


def test_the_time_that_a_lost_engine_took_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(Dying):
        def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
            now[0] += timeout_s if actions[0].do is Do.PREPARE else 0.0
            return super().perform(actions, label, timeout_s)

    assert opened(Slow(when="prepare", dying=("e1",))).publish(5)["sync/version"] == 5
    log = Slow()
    with pytest.raises(NotProven, match=r"publishing weights r/2/5: not in every engine after 10 s \(sync.timeout_s\)"):
        opened(log).publish(5)
    assert log.calls[-2:] == ["perform drop e0, drop e1", "give_up r/2/5"]


@pytest.mark.parametrize("fails", ["perform", "acknowledge", "advance"])
def test_after_an_interruption_nothing_can_be_published(fails: str) -> None:
    log = Log()
    made = opened(log)
    made.publish(5)
    log.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        made.publish(6)
    log.fails = ""
    for number in (5, 6):
        with pytest.raises(NotProven, match="r/2/6 was interrupted; start the run again"):
            made.publish(number)


@pytest.mark.parametrize("fails", ["delta", "offer"])
def test_what_fails_before_any_engine_knows_can_be_tried_again(fails: str) -> None:
    log = Log()
    made = opened(log)
    made.publish(5)
    log.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} failed"):
        made.publish(6)
    assert log.calls[-1] == "give_up r/2/6", "hosts may have heard of it"
    assert made.publish(5) == {}
    log.fails = ""
    assert made.publish(6)["sync/version"] == 6


def test_engines_keep_what_they_loaded_without_a_trainer() -> None:
    log = Log()
    made = channel(None, log)
    assert made.open() == 2
    assert made.publish(0) == {"sync/version": 0.0} and log.calls == ["relabel r/2/0"]
    assert made.publish(0) == {}


def test_nothing_is_published_without_engines() -> None:
    made = channel(Log(), None)
    assert made.open() == 2 and made.publish(3) == {}


def test_deadline_names_its_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    made = opened(Log())
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(TimeoutError, match=r"publishing weights r/2/5: not in every engine after 10 s \(sync.timeout_s\)"):
        made.publish(5)
