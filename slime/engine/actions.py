"""What the engines of a host are told to do with one version, one action at a time for each (see sync/publication.py).

An action that fails says so in its Answer and raises nothing, whatever went wrong, since the driver decides upon it together with what
the other engines answered. An engine that has failed and does not answer a probe is lost: where it is a server of slime's, its process is
killed, so that nothing that was asked of it can still happen. Actions on one engine follow one another: an UNDO waits until the COMMIT that
is given up has ended.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.config.plan_share import STAGE_MOST
from slime.engine.errors import EngineError, EngineLost
from slime.engine.incoming import IncomingDelta, IncomingWhole
from slime.engine.live import LiveEngine, Written
from slime.engine.served import Served
from slime.sync.inserver_client import RankError
from slime.sync.manifest import root_of
from slime.sync.protocol import Answer, Bucket
from slime.sync.publication import Action, Do
from slime.sync.states import Held, Refused
from slime.types import WeightVersion

MIB = 1 << 20
FAILURES = (EngineError, RankError, TimeoutError, Refused, OSError)
FINAL = (Do.UNDO, Do.HEAL, Do.DROP, Do.RESUME)  # that fail for good: the engine is lost to the publication
NAMED = 4  # tensors in a message
PROBE_S = 10.0  # in which the scheduler of an engine that failed answers


class Actions:
    """For the version `incoming`, from the one that is `served`. `paths` are staged files by signature of the live map."""

    def __init__(self, cfg: SlimeConfig, served: Served, incoming: IncomingDelta | IncomingWhole, paths: Mapping[str, Path]) -> None:
        self.incoming = incoming
        self._cfg, self._served, self._paths = cfg.sync, served, paths
        self._health_timeout_s = cfg.rollout.health_timeout_s
        self._whole: set[str] = set()  # engines that the version is loaded into whole
        self._spoiled: dict[str, str] = {}  # engines that were found to hold other bits than the version before, and what was found
        self._turns: dict[str, asyncio.Lock] = {}
        self._seen: dict[str, LiveEngine] = {}  # the engines that were asked first
        self._late: set[asyncio.Task[Answer]] = set()  # given up, not ended
        self._calls: dict[Do, Callable[[LiveEngine], Any]] = {
            Do.PREPARE: self._prepare,
            Do.DROP: self._drop,
            Do.COMMIT: self._commit,
            Do.UNDO: self._undo,
            Do.HEAL: self._heal,
            Do.RESUME: self._resume,
        }

    async def perform(self, actions: Sequence[Action], engines: Mapping[str, LiveEngine], timeout_s: float) -> list[Answer]:
        """Do these side by side; one answer each, after `timeout_s` or soon afterwards."""
        return await asyncio.gather(*(self._answer(action, engines[action.engine], timeout_s) for action in actions))

    async def _answer(self, action: Action, engine: LiveEngine, timeout_s: float) -> Answer:
        if self._seen.setdefault(action.engine, engine) is not engine:
            return Answer(action, f"{action.engine} was started anew meanwhile", lost=True)
        begun_s, task = time.monotonic(), asyncio.create_task(self._perform(action, engine))
        lost = await self._lost_meanwhile(action, engine, task, timeout_s)
        if not lost and task.done() and task.exception() is None:
            return task.result()
        if not lost and task.done():
            lost = await engine.probe(PROBE_S)
        failed = task.exception() if task.done() else self._too_late(action, time.monotonic() - begun_s, timeout_s, lost)
        assert isinstance(failed, Exception), failed
        said = self._said(engine, failed)
        if not task.done():
            self._late.add(task)
            task.add_done_callback(self._over)
        if lost:
            await self._give_up(engine, lost)
        elif action.do in FINAL:
            await self._fence(engine, failed, written=action.do is not Do.DROP)
        return Answer(action, said, lost=bool(lost))

    def _too_late(self, action: Action, waited_s: float, timeout_s: float, lost: str) -> Exception:
        """What is wrong with an engine that has not answered."""
        knob = "sync.timeout_s" if waited_s >= timeout_s else "rollout.health_timeout_s"
        late = f"waiting for {action.engine} to {action.do}: nothing after {waited_s:.3g} s ({knob})"
        return EngineLost(f"{late}, nor to a probe: {lost}") if lost else TimeoutError(late)

    async def _lost_meanwhile(self, action: Action, engine: LiveEngine, task: "asyncio.Task[Answer]", timeout_s: float) -> str:
        """Wait for the task; why its engine is lost, if it is. While it stages, it generates and answers; while it writes, it does not."""
        until = time.monotonic() + timeout_s
        slice_s = self._health_timeout_s if action.do in (Do.PREPARE, Do.DROP) else timeout_s
        while not (await asyncio.wait([task], timeout=max(0.0, min(slice_s, until - time.monotonic()))))[0]:
            if lost := await engine.probe(PROBE_S):
                return lost
            if time.monotonic() >= until:
                break
        return ""

    def _over(self, task: "asyncio.Task[Answer]") -> None:
        """What was given up has ended, whatever came of it."""
        self._late.discard(task)
        if not task.cancelled():
            task.exception()

    async def _give_up(self, engine: LiveEngine, why: str) -> None:
        """The host agent brings it back (see tending.py)."""
        engine.lost = why
        if engine.state is not None:
            engine.state.fence(why)
        if engine.server is not None:
            await asyncio.to_thread(engine.server.stop)

    async def _perform(self, action: Action, engine: LiveEngine) -> Answer:
        async with self._turns.setdefault(action.engine, asyncio.Lock()):
            return Answer(action, **await self._calls[action.do](engine))

    def _said(self, engine: LiveEngine, error: Exception) -> str:
        """What went wrong, with the end of the log of a server that is lost, or the knob of a deadline that has passed."""
        if isinstance(error, EngineLost) and engine.server is not None:
            return f"{error}; the end of {engine.server.spec.log}:\n{engine.server.tail()}"
        if not isinstance(error, FAILURES):
            return f"{type(error).__name__}: {error}"
        late = isinstance(error, TimeoutError) and str(error).endswith(f"after {self._cfg.timeout_s:g} s")
        return f"{error} (sync.timeout_s)" if late else str(error)

    # --- the actions --------------------------------------------------------------------------------------------------

    async def _prepare(self, engine: LiveEngine) -> dict[str, Any]:
        if isinstance(self.incoming, IncomingWhole):
            self._whole.add(engine.endpoint.name)
            return {}
        assert engine.state is not None
        engine.state.check(self.incoming.manifest)
        staged = 0
        if engine.on_device and self._too_much(engine):
            self._whole.add(engine.endpoint.name)
        else:
            try:
                staged = await engine.stage(self._paths, self.incoming.label, self.incoming.manifest.parent_label, self._cfg.timeout_s)
            except RankError as refused:
                await self._look_closer(engine, refused)
        engine.state.stage(self.incoming.manifest)
        return {"staged_bytes": staged}

    def _too_much(self, engine: LiveEngine) -> bool:
        """Whether a rank would hold too much beside its weights, as after a resume from a model that has learned much since."""
        return any(
            self._paths[found.signature].stat().st_size > STAGE_MOST * sum(live.size * live.width for live in found.lives)
            for found in engine.maps
        )

    async def _look_closer(self, engine: LiveEngine, refused: RankError) -> None:
        """A rank did not stage. Where its weights have changed since they were proven, their tensors are named; with on_mismatch=heal its
        COMMIT fails by that, and is healed."""
        reason = ""
        with contextlib.suppress(*FAILURES):
            reason = wrong(engine, await engine.audit(self._cfg.timeout_s), self._served.engine.fingerprints)
        if not reason or self._cfg.on_mismatch != "heal":
            raise EngineError(f"{refused}; {reason}" if reason else str(refused)) from refused
        self._spoiled[engine.endpoint.name] = reason

    async def _drop(self, engine: LiveEngine) -> dict[str, Any]:
        assert engine.state is not None
        if isinstance(self.incoming, IncomingDelta):
            await engine.drop(self.incoming.label, self._cfg.timeout_s)
            engine.state.drop()
        return {}

    async def _commit(self, engine: LiveEngine) -> dict[str, Any]:
        assert engine.state is not None
        await engine.pause(self._cfg.pause, self._cfg.timeout_s)
        if engine.endpoint.name in self._whole:
            return await self._load(engine)
        assert isinstance(self.incoming, IncomingDelta)
        if reason := self._spoiled.get(engine.endpoint.name):
            raise EngineError(f"before it was written to, {reason}")
        manifest = self.incoming.manifest
        engine.state.write(manifest.version)
        flush = self._cfg.pause != "in_place"  # else requests go on with the prefixes of old weights
        written = await engine.commit(manifest.label, manifest.parent_label, self.incoming.opaque, flush, self._cfg.timeout_s)
        reason = wrong(engine, written, self.incoming.of_engines)
        engine.state.proof("" if reason else root_of(self.incoming.fingerprints))
        if reason:
            raise EngineError(reason)
        return {"write_s": written.write_s, "audit_s": written.audit_s}

    async def _heal(self, engine: LiveEngine) -> dict[str, Any]:
        self._whole.add(engine.endpoint.name)
        return await self._load(engine)

    async def _load(self, engine: LiveEngine) -> dict[str, Any]:
        """The version, whole."""
        incoming, buckets = self.incoming, self.incoming.buckets(self._cfg.bucket_mb * MIB)
        written, reason = await self._whole_of(engine, buckets, incoming.label, incoming.fingerprints, incoming.of_engines)
        if reason:
            raise EngineError(reason)
        return {"audit_s": written.audit_s}

    async def _whole_of(
        self, engine: LiveEngine, buckets: Iterable[Bucket], label: str, fingerprints: Sequence[int], of_engines: Sequence[int]
    ) -> tuple[Written, str]:
        """All tensors of a version through SGLang's own update; what was found, and what of it is wrong."""
        assert engine.state is not None
        await engine.halt()
        engine.state.reload()
        written = await engine.load_whole(buckets, label, self._cfg.timeout_s)
        reason = wrong(engine, written, of_engines)
        if not reason:
            engine.state.adopted(Held(WeightVersion.parse(label), root_of(fingerprints)))
        return written, reason

    async def _undo(self, engine: LiveEngine) -> dict[str, Any]:
        """Back to the version of the host copy, paused."""
        assert engine.state is not None
        held, of_engines = self._served.trainer, self._served.engine.fingerprints
        if engine.endpoint.name in self._whole:
            buckets = self._served.buckets(self._cfg.bucket_mb * MIB)
            _, reason = await self._whole_of(engine, buckets, held.label, held.fingerprints, of_engines)
        else:
            assert isinstance(self.incoming, IncomingDelta)
            await engine.pause("in_place", self._cfg.timeout_s)  # it is, unless that is what failed
            written = await engine.undo(self.incoming.label, held.label, self.incoming.opaque_before, self._cfg.timeout_s)
            if not (reason := wrong(engine, written, of_engines)):
                engine.state.undo(self.incoming.manifest.version, root_of(held.fingerprints))
        if reason:
            raise EngineError(f"{held.label} was not restored: {reason}")
        return {}

    async def _resume(self, engine: LiveEngine) -> dict[str, Any]:
        assert engine.state is not None
        try:
            await engine.resume()
        except (EngineError, TimeoutError):
            await engine.resume()  # it may have gone on already, which is no error
        engine.state.accept()
        return {}

    async def _fence(self, engine: LiveEngine, error: Exception, written: bool) -> None:
        """It takes part no more. Where it was `written` to, it is paused if it can be, and calls its weights by a label that no client
        expects: SGLang may call what failed by the version's."""
        assert engine.state is not None
        engine.state.fence(str(error))
        if not written:
            return
        with contextlib.suppress(*FAILURES):
            await engine.pause("in_place", self._cfg.timeout_s)
        with contextlib.suppress(*FAILURES):
            await engine.relabel(f"{WeightVersion.parse(self.incoming.label).run_id}/fenced")


def wrong(engine: LiveEngine, written: Written, expected: Sequence[int]) -> str:
    """What of an engine's live weights is not as it should be; empty where all is."""
    if engine.proof is None:
        return ""
    if written.errors:
        return "; ".join(written.errors)
    found = engine.proof.wrong(written.fingerprints, expected)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"the live bits of {', '.join(found[:NAMED])}{more} are not the trainer's" if found else ""
