"""The weights of one host: the host copy, the version that is on its way, and what its engines are told to do with it.

Every method of `HostWeights` but `perform` raises what went wrong. `perform` answers for each engine, since one engine's failure is decided
upon by the driver together with what the others answered (see sync/publication.py).
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.engine.errors import EngineError, EngineLost
from slime.engine.host_copy import HostCopy
from slime.engine.incoming import IncomingDelta, IncomingWhole
from slime.engine.live import LiveEngine, Written
from slime.engine.shared_folder import SharedFolder
from slime.sync import transport
from slime.sync.fold import Weights, anchor
from slime.sync.inserver_client import RankError
from slime.sync.manifest import Manifest, root_of, sign, verify
from slime.sync.protocol import Adoption, Answer, Bucket
from slime.sync.publication import Action, Do
from slime.sync.records import ModelSpec
from slime.sync.states import Fenced, Held, Refused
from slime.sync.store import WeightStore
from slime.sync.store_fsspec import open_store
from slime.types import WeightVersion

MIB = 1 << 20
FAILURES = (EngineError, RankError, TimeoutError, Refused, OSError)
NAMED = 4  # tensors in a message


class HostWeights:
    """See the module. `engines` gives the host's engines as they are now."""

    def __init__(self, cfg: SlimeConfig, engines: Callable[[], Sequence[LiveEngine]]) -> None:
        self._cfg = cfg
        self._engines = engines
        self._copy: HostCopy | None = None
        self._incoming: IncomingDelta | IncomingWhole | None = None
        self._paths: dict[str, Path] = {}  # staged files by signature of the live map
        self._buckets: list[Bucket] = []  # of a whole version that is being offered
        self._healed: set[str] = set()  # engines that the version was loaded into whole
        self._spoiled: dict[str, str] = {}  # engines that were found to hold other bits than the version before, and what was found
        self.warnings: list[str] = []  # of engines that were taken in
        self._anchor: asyncio.Task[None] | None = None
        self._shared = SharedFolder()
        self._folder = self._shared.path

    def close(self) -> None:
        """Remove what lies in shared memory. May be called again."""
        self._shared.close()

    @property
    def adopted(self) -> bool:
        """Whether there is a version to bring an engine to."""
        return self._copy is not None

    @property
    def copy(self) -> HostCopy:
        assert self._copy is not None, "adopt comes first"
        return self._copy

    # --- the base -----------------------------------------------------------------------------------------------------

    async def adopt(self, spec_json: str, run: Adoption) -> None:
        """Read the model directory, and bring every engine to it, proven. Raises ValueError for an engine that cannot be followed."""
        if self._cfg.sync.mode == "delta" and self._cfg.sync.transport == "host" and not Path(run.url).is_dir():
            raise ValueError(f"sync.transport=host: {run.url} is not on this host, where engines run; set sync.transport to ray or store")
        self._run, run_id = run, run.run_id
        spec = ModelSpec.from_json(spec_json)
        (self._folder / "spec.json").write_text(spec_json)
        base = WeightVersion(-1, -1, run_id).label
        self._copy = await asyncio.to_thread(HostCopy.read, spec, Path(self._cfg.model.path), run_id, base)
        await asyncio.gather(*(self.take_in(engine) for engine in self._engines()))

    async def take_in(self, engine: LiveEngine) -> None:
        """Let an engine that has just started learn, and bring it to the version of the host copy, proven. It generates afterwards."""
        copy, timeout_s = self.copy, self._cfg.sync.timeout_s
        engine.facts.check_pause(self._cfg.sync.pause, engine.endpoint.sglang, engine.endpoint.name)
        socket = self._folder / engine.endpoint.name.replace(" ", "_").replace("/", "_")
        reason = await self._learn(engine, socket)
        assert engine.state is not None
        if reason or copy.label != WeightVersion(-1, -1, self._run.run_id).label:
            await engine.pause(self._cfg.sync.pause, timeout_s)
            written = await engine.load_whole(copy.buckets(self._cfg.sync.bucket_mb * MIB), copy.label, self._flush, timeout_s)
            if reason := _wrong(engine, written, copy.fingerprints):
                raise ValueError(f"{engine.endpoint.name} does not hold {copy.label} after it was loaded whole: {reason}")
            await engine.resume()
        engine.state.adopted(Held(WeightVersion.parse(copy.label), root_of(copy.fingerprints)))

    async def _learn(self, engine: LiveEngine, socket: Path) -> str:
        """What of the engine's weights is not the host copy's; empty where all is. With sync.mode=full an engine may be one that cannot be
        followed: it is used without a proof, with a warning."""
        copy = self.copy
        try:
            written = await engine.learn(copy.spec, self._folder / "spec.json", self._run.run_id, socket, self._cfg.sync.timeout_s)
        except (ValueError, EngineError) as error:
            if self._cfg.sync.mode == "delta" or isinstance(error, EngineLost):
                raise
            self.warnings.append(f"{engine.endpoint.name}: its weights are not proven, only labelled: {error}")
            engine.forget(copy.spec, self._run.run_id)
            return ""
        assert engine.proof is not None
        for name, why in engine.proof.opaque.items():
            self.warnings.append(
                f"{engine.endpoint.name} holds {name} in another form ({why}): it is loaded whole and not proven by its bits"
            )
        return _wrong(engine, written, copy.fingerprints)

    def live(self) -> list[LiveEngine]:
        """Engines that take part: those that learned and are not fenced."""
        return [e for e in self._engines() if e.state is not None and not isinstance(e.state.state, Fenced)]

    # --- a version ----------------------------------------------------------------------------------------------------

    async def offer(self, manifest_json: str, parts: Sequence[bytes]) -> None:
        """Check and decode a delta, and write what the engines will stage. Raises ManifestError, WireError, ValueError; nothing has
        changed then."""
        self._forget()
        manifest = Manifest.from_json(manifest_json)
        verify(manifest, self._run.key)
        for engine in self.live():
            assert engine.state is not None, "adopt comes first"
            engine.state.check(manifest)
        self._incoming, self._paths = await asyncio.to_thread(self._decode, manifest, parts)

    def _decode(self, manifest: Manifest, given: Sequence[bytes]) -> tuple[IncomingDelta, dict[str, Path]]:
        parts = transport.fetch(manifest, given, self._run.url, self._cfg.sync.timeout_s)
        incoming = IncomingDelta(manifest, lambda number: parts[number], self.copy)
        maps = {found.signature: found for engine in self.live() for found in engine.maps}
        opaque = {name for found in maps.values() for name in found.opaque}
        return incoming, incoming.stage(maps, opaque, self._folder, self._run.run_id)

    async def offer_bucket(self, bucket: Bucket) -> int:
        """A part of a whole version; its bytes."""
        self._buckets.append(bucket)
        return sum(tensor.nbytes for _, tensor in bucket)

    async def offer_whole(self, label: str) -> None:
        """The buckets since the last offer are the version `label`."""
        buckets, self._buckets = self._buckets, []
        self._forget()
        self._incoming = await asyncio.to_thread(IncomingWhole, self.copy, buckets, label)

    async def perform(self, actions: Sequence[Action], label: str) -> list[Answer]:
        """Do these side by side; one answer each."""
        engines = {engine.endpoint.name: engine for engine in self._engines()}
        return list(await asyncio.gather(*(self._answer(action, engines[action.engine], label) for action in actions)))

    async def advance(self, label: str) -> None:
        """The host copy becomes the version that every engine has proven."""
        assert self._incoming is not None and self._incoming.label == label, f"{label} was not offered"
        if self._anchor is not None:
            await self._anchor
        await asyncio.to_thread(self._incoming.apply)
        self._forget()

    def write_anchor(self, manifest_json: str) -> None:
        """Begin to write what the host copy holds whole to the run's files. `advance` waits for it and raises what went wrong."""
        self._anchor = asyncio.create_task(asyncio.to_thread(self._write_anchor, Manifest.from_json(manifest_json)))

    def _write_anchor(self, manifest: Manifest) -> None:
        copy, run = self.copy, self._run
        whole = anchor(Weights(copy.spec, run.run_id, [copy.bits(i) for i in range(len(copy.spec.tensors))]), manifest)
        WeightStore(open_store(run.url, self._cfg.sync.timeout_s), run.run_id).add(sign(whole.manifest, run.key), whole.parts)

    def _forget(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)
        if isinstance(self._incoming, IncomingDelta):
            self._incoming.forget()
        self._incoming, self._paths, self._healed, self._spoiled = None, {}, set(), {}

    # --- one engine ---------------------------------------------------------------------------------------------------

    async def _answer(self, action: Action, engine: LiveEngine, label: str) -> Answer:
        assert self._incoming is not None and self._incoming.label == label, f"{label} was not offered"
        calls: dict[Do, Callable[[LiveEngine], Any]] = {
            Do.PREPARE: self._prepare,
            Do.DROP: self._drop,
            Do.COMMIT: self._commit,
            Do.UNDO: self._undo,
            Do.HEAL: self._load,
            Do.RESUME: self._resume,
        }
        try:
            found = await calls[action.do](engine)
        except FAILURES as error:
            if action.do in (Do.UNDO, Do.HEAL):
                await self._fence(engine, error)
            return Answer(action, self._said(engine, error))
        return Answer(action, **found)

    def _said(self, engine: LiveEngine, error: Exception) -> str:
        """What went wrong, with the end of the log of a server that is lost, or the knob of a deadline that has passed."""
        if isinstance(error, EngineLost) and engine.server is not None:
            return f"{error}; the end of {engine.server.spec.log}:\n{engine.server.tail()}"
        late = isinstance(error, TimeoutError) and str(error).endswith(f"after {self._cfg.sync.timeout_s:g} s")
        return f"{error} (sync.timeout_s)" if late else str(error)

    async def _prepare(self, engine: LiveEngine) -> dict[str, Any]:
        incoming = self._incoming
        assert engine.state is not None
        if isinstance(incoming, IncomingWhole):
            return {}
        assert incoming is not None
        engine.state.check(incoming.manifest)
        try:
            staged = await engine.stage(self._paths, incoming.label, incoming.manifest.parent_label, self._cfg.sync.timeout_s)
        except RankError as refused:
            staged = await self._refused(engine, refused)
        engine.state.stage(incoming.manifest)
        return {"staged_bytes": staged}

    async def _refused(self, engine: LiveEngine, refused: RankError) -> int:
        """A rank did not stage. Where its weights have changed since they were proven, their tensors are named; with on_mismatch=heal its
        COMMIT fails by that, and is healed."""
        reason = ""
        with contextlib.suppress(*FAILURES):
            reason = _wrong(engine, await engine.audit(self._cfg.sync.timeout_s), self.copy.fingerprints)
        if not reason or self._cfg.sync.on_mismatch != "heal":
            raise EngineError(f"{refused}; {reason}" if reason else str(refused)) from refused
        self._spoiled[engine.endpoint.name] = reason
        return 0

    async def _drop(self, engine: LiveEngine) -> dict[str, Any]:
        assert self._incoming is not None and engine.state is not None
        if isinstance(self._incoming, IncomingDelta):
            await engine.drop(self._incoming.label, self._cfg.sync.timeout_s)
            engine.state.drop()
        return {}

    async def _commit(self, engine: LiveEngine) -> dict[str, Any]:
        incoming, timeout_s = self._incoming, self._cfg.sync.timeout_s
        assert incoming is not None and engine.state is not None
        await engine.pause(self._cfg.sync.pause, timeout_s)
        if isinstance(incoming, IncomingWhole):
            return await self._load(engine)
        engine.state.write(incoming.manifest.version)
        if reason := self._spoiled.get(engine.endpoint.name):
            raise EngineError(f"before it was written to, {reason}")
        written = await engine.commit(incoming.label, incoming.manifest.parent_label, incoming.opaque, self._flush, timeout_s)
        return self._proven(engine, written)

    async def _load(self, engine: LiveEngine) -> dict[str, Any]:
        """The version, whole, through SGLang's own update."""
        incoming = self._incoming
        assert incoming is not None and engine.state is not None
        self._healed.add(engine.endpoint.name)
        engine.state.reload()
        buckets = incoming.buckets(self._cfg.sync.bucket_mb * MIB)
        written = await engine.load_whole(buckets, incoming.label, self._flush, self._cfg.sync.timeout_s)
        return self._proven(engine, written)

    def _proven(self, engine: LiveEngine, written: Written) -> dict[str, Any]:
        """Raises EngineError naming tensors whose live bits are not the version's."""
        incoming = self._incoming
        assert incoming is not None and engine.state is not None
        if reason := _wrong(engine, written, incoming.fingerprints):
            raise EngineError(reason)
        root = root_of(incoming.fingerprints)
        if engine.endpoint.name in self._healed:
            engine.state.adopted(Held(WeightVersion.parse(incoming.label), root))
        else:
            engine.state.proof(root)
        return {"write_s": written.write_s, "audit_s": written.audit_s}

    async def _undo(self, engine: LiveEngine) -> dict[str, Any]:
        """Back to the version of the host copy."""
        incoming, copy, timeout_s = self._incoming, self.copy, self._cfg.sync.timeout_s
        assert incoming is not None and engine.state is not None
        root = root_of(copy.fingerprints)
        await engine.pause("in_place", timeout_s)  # it is, unless that is what failed
        if isinstance(incoming, IncomingDelta) and engine.endpoint.name not in self._healed:
            written = await engine.undo(incoming.label, copy.label, incoming.opaque_before, timeout_s)
            if not (reason := _wrong(engine, written, copy.fingerprints)):
                engine.state.undo(incoming.manifest.version, root)
        else:
            engine.state.reload()
            written = await engine.load_whole(copy.buckets(self._cfg.sync.bucket_mb * MIB), copy.label, self._flush, timeout_s)
            if not (reason := _wrong(engine, written, copy.fingerprints)):
                engine.state.adopted(Held(WeightVersion.parse(copy.label), root))
        if reason:
            engine.state.fence(reason)
            raise EngineError(f"{copy.label} was not restored: {reason}")
        return {}

    async def _resume(self, engine: LiveEngine) -> dict[str, Any]:
        assert engine.state is not None
        engine.state.accept()
        await engine.resume()
        return {}

    async def _fence(self, engine: LiveEngine, error: Exception) -> None:
        """It stays paused and takes part no more. SGLang calls what failed by its label: it gets one that no client expects."""
        assert engine.state is not None
        engine.state.fence(str(error))
        if not isinstance(error, EngineLost | TimeoutError):
            with contextlib.suppress(*FAILURES):
                await engine.relabel(f"{self._run.run_id}/fenced")

    @property
    def _flush(self) -> bool:
        """Prefixes of old weights are dropped, unless requests go on with them."""
        return self._cfg.sync.pause != "in_place"


def _wrong(engine: LiveEngine, written: Written, expected: Sequence[int]) -> str:
    """What of an engine's live weights is not as it should be; empty where all is."""
    if engine.proof is None:
        return ""
    if written.errors:
        return "; ".join(written.errors)
    wrong = engine.proof.wrong(written.fingerprints, expected)
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return f"the live bits of {', '.join(wrong[:NAMED])}{more} are not the trainer's" if wrong else ""
