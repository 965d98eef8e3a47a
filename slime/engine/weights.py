"""The weights of one host: the host copy, the version that is on its way, and the engines that join.

Every method of `HostWeights` but `perform` raises what went wrong. The engines' part of a version is in actions.py.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from slime.cluster.shared_folder import SharedFolder
from slime.config import SlimeConfig
from slime.config.roles import swaps
from slime.engine.actions import MIB, Actions, wrong
from slime.engine.errors import EngineError, EngineLost
from slime.engine.host_copy import HostCopy
from slime.engine.incoming import IncomingDelta, IncomingWhole
from slime.engine.live import LiveEngine
from slime.engine.served import Served, served
from slime.engine.server import LOADED
from slime.sync import transport
from slime.sync.fold import Weights, anchor
from slime.sync.manifest import Manifest, root_of, sign, verify
from slime.sync.protocol import Adoption, Answer, Bucket
from slime.sync.publication import Action
from slime.sync.records import ModelSpec
from slime.sync.states import Held
from slime.sync.store import WeightStore
from slime.sync.store_fsspec import open_store
from slime.types import WeightVersion

PUBLICATIONS = 3  # times sync.timeout_s: longer than any publication takes


class HostWeights:
    """See the module. `engines` gives the host's engines as they are now."""

    def __init__(self, cfg: SlimeConfig, engines: Callable[[], Sequence[LiveEngine]]) -> None:
        self._cfg = cfg
        self._engines = engines
        self._served: Served | None = None
        self._actions: Actions | None = None  # of the version that was offered
        self._paths: dict[str, Path] = {}  # its staged files
        self._buckets: list[Bucket] = []  # of a whole version that is being offered
        self.warnings: list[str] = []  # of engines that were taken in
        self._anchor: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # for what reads or writes all of the host copy
        self._unoffered = asyncio.Event()  # no version is on its way
        self._unoffered.set()
        self._taking_in: asyncio.Timeout | None = None  # the deadline of the engine that is taken in
        self._shared = SharedFolder()
        self._folder = self._shared.path

    def close(self) -> None:
        """Remove what lies in shared memory. May be called again."""
        self._shared.close()

    @property
    def adopted(self) -> bool:
        """Whether there is a version to bring an engine to."""
        return self._served is not None

    @property
    def served(self) -> Served:
        assert self._served is not None, "adopt comes first"
        return self._served

    @property
    def copy(self) -> HostCopy:
        """The trainer's tensors of the version that is held."""
        return self.served.trainer

    # --- engines that come --------------------------------------------------------------------------------------------

    async def adopt(self, spec_json: str, run: Adoption) -> None:
        """Read the model directory, and bring every engine to it, proven. Raises ValueError for an engine that cannot be followed."""
        if self._cfg.sync.mode == "delta" and self._cfg.sync.transport == "host" and not Path(run.url).is_dir():
            raise ValueError(f"sync.transport=host: {run.url} is not on this host, where engines run; set sync.transport to ray or store")
        self._run = run
        self._unoffered.set()  # what a driver before this one had on its way is nobody's any more
        spec = ModelSpec.from_json(spec_json)
        self._base = WeightVersion(-1, -1, run.run_id).label
        copy = await asyncio.to_thread(HostCopy.read, spec, Path(self._cfg.model.path), run.run_id, self._base)
        self._served = await asyncio.to_thread(served, copy, self._cfg.rollout.quantization, run.run_id)
        (self._folder / "spec.json").write_text(self._served.engine.spec.to_json())
        await asyncio.gather(*(self._take_in(engine) for engine in self._engines()))

    async def take_in(self, engine: LiveEngine) -> None:
        """Bring an engine that has come late to the version of the host copy, proven. It generates afterwards. While a version is on its
        way this waits, and takes the engine to that one. Raises TimeoutError naming sync.timeout_s, and what `adopt` raises; an engine
        whose weights were not touched then goes on as it was."""
        name, timeout_s = engine.endpoint.name, self._cfg.sync.timeout_s
        await self._own_turn(name)
        try:
            async with asyncio.timeout(timeout_s) as self._taking_in:
                await self._take_in(engine)
        except TimeoutError as error:
            raise TimeoutError(f"{name} was not caught up after {timeout_s:g} s (sync.timeout_s): {error}") from error
        finally:
            self._taking_in = None
            self._turn.release()

    async def _own_turn(self, name: str) -> None:
        """The turn, when no version is on its way. A publication has a deadline, and ends its offer however it goes."""
        limit_s = PUBLICATIONS * self._cfg.sync.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    await self._unoffered.wait()
                    await self._turn.acquire()
                    if self._unoffered.is_set():
                        return
                    self._turn.release()
        except TimeoutError:
            raise TimeoutError(f"{name} waits to be caught up: a publication has not ended after {limit_s:g} s") from None

    @contextlib.asynccontextmanager
    async def _offering(self) -> AsyncIterator[None]:
        """A version is on its way from here on, until `advance` or `give_up`. An engine that is being taken in may end that first, in half
        of the publication's time."""
        self._unoffered.clear()
        if self._taking_in is not None:
            loop, limit = asyncio.get_running_loop(), self._taking_in
            limit.reschedule(min(limit.when() or math.inf, loop.time() + self._cfg.sync.timeout_s / 2))
        async with self._turn:
            self._forget()
            yield

    async def _take_in(self, engine: LiveEngine) -> None:
        """Nothing is answered between the first look at its weights and their proof, nor with prefixes of weights from before. The map of
        one that was released is known: what had no source then, and is not loaded either, must be as it was."""
        copy, timeout_s = self.copy, self._cfg.sync.timeout_s
        engine.facts.check_pause(self._cfg.sync.pause, engine.endpoint.sglang, engine.endpoint.name)
        await engine.halt()
        try:
            reason = "" if engine.released else await self._learn(engine)
            whole = bool(reason) or engine.released or copy.label != self._base
            if not whole and engine.server is None:
                await engine.flush()
        except BaseException:
            await engine.resume()
            raise
        name, converts = engine.endpoint.name, self.served.converts
        if reason and not converts and copy.label == self._base and await engine.label() == f"{self._run.run_id}/{LOADED}":
            raise ValueError(
                f"{name} has just read model.path={self._cfg.model.path}, and does not hold its bits: {reason}; this SGLang keeps weights "
                "in another layout, with which deltas would break them"
            )
        if whole:
            if reason and not converts and copy.label == self._base:
                self.warnings.append(f"{name} is loaded whole: {reason}")
            written = await engine.load_whole(self.served.buckets(self._cfg.sync.bucket_mb * MIB), copy.label, timeout_s)
            if left := wrong(engine, written, self.served.engine.fingerprints):
                said = f"{name} does not hold {copy.label} after it was loaded whole: {left}; it stays paused"
                raise EngineError(said) if engine.released else ValueError(said)  # something was not restored: another process has it all
            engine.released = False
        assert engine.state is not None
        engine.state.adopted(Held(WeightVersion.parse(copy.label), root_of(copy.fingerprints)))
        await engine.resume()

    async def _learn(self, engine: LiveEngine) -> str:
        """What of the engine's weights is not the host copy's; empty where all is. With sync.mode=full an engine may be one that cannot be
        followed: it is used without a proof, with a warning."""
        copy, name = self.copy, engine.endpoint.name
        socket = self._folder / name.replace(" ", "_").replace("/", "_")
        try:
            written = await engine.learn(
                self.served.engine.spec, self._folder / "spec.json", copy.spec.signature, self._run.run_id, socket, self._cfg.sync.timeout_s
            )
        except (ValueError, EngineError) as error:
            if self.served.converts and isinstance(error, ValueError):  # whether it would take codes for codes is not known
                mend = "with rollout.quantization=fp8 every engine is proven, in either mode; set rollout.quantization=none"
                raise ValueError(f"{error}: {mend}") from error
            if self.served.converts or self._cfg.sync.mode == "delta" or isinstance(error, EngineLost):
                raise
            if swaps(self._cfg):
                raise ValueError(f"{error}; with cluster.share=swap every engine is proven: set cluster.share to split or none") from error
            self.warnings.append(f"{name}: its weights are not proven, only labelled: {error}")
            engine.forget(copy.spec, self._run.run_id)
            return ""
        self._check_form(engine)
        assert engine.proof is not None
        for tensor, why in engine.proof.opaque.items():
            self.warnings.append(f"{name} holds {tensor} in another form ({why}): it is loaded whole and not proven by its bits")
        return wrong(engine, written, self.served.engine.fingerprints)

    def _check_form(self, engine: LiveEngine) -> None:
        """Raises ValueError for an engine that is quantised and should not be, or otherwise than it should be: what it would make of the
        weights is nobody's model."""
        name, spec = engine.endpoint.name, self.served.engine.spec
        if not self.served.converts:
            eights = [live.name for found in engine.maps for live in found.lives if live.dtype.startswith("float8")]
            if eights:
                raise ValueError(f"{name} is quantised, it holds {eights[0]} as FP8: set rollout.quantization=fp8, or serve it in bf16")
            return
        dtypes = {tensor.name: tensor.dtype for tensor in spec.tensors}
        form = "as an FP8 checkpoint with blocks of 128 x 128 has it"
        for found in engine.maps:
            for tensor, why in found.opaque.items():
                if "float8" in why or dtypes[tensor.removesuffix("_scale_inv")].startswith("float8"):
                    raise ValueError(f"{name} does not hold {tensor} {form} ({why}): set rollout.quantization=none, or serve it so")
            for live in map(found.lives.__getitem__, found.foreign):
                if live.dtype.startswith("float8") or live.name.endswith("scale_inv"):
                    raise ValueError(
                        f"{name} does not hold {live.name} {form}: it has elements of no tensor; set rollout.quantization=none"
                    )

    def live(self) -> list[LiveEngine]:
        """Engines that take part: those that hold a version, proven."""
        return [e for e in self._engines() if e.state is not None and e.state.held is not None]

    # --- a version ----------------------------------------------------------------------------------------------------

    async def offer(self, manifest_json: str, parts: Sequence[bytes]) -> None:
        """Check and decode a delta, and write what the engines will stage. Raises ManifestError, WireError, ValueError; nothing has
        changed then."""
        async with self._offering():
            manifest = Manifest.from_json(manifest_json)
            verify(manifest, self._run.key)
            for engine in self.live():
                assert engine.state is not None, "adopt comes first"
                engine.state.check(manifest)
            incoming, self._paths = await asyncio.to_thread(self._decode, manifest, parts)
            self._actions = Actions(self._cfg, self.served, incoming, self._paths)

    def _decode(self, manifest: Manifest, given: Sequence[bytes]) -> tuple[IncomingDelta, dict[str, Path]]:
        parts = transport.fetch(manifest, given, self._run.url, self._cfg.sync.timeout_s)
        incoming = IncomingDelta(manifest, lambda number: parts[number], self.served)
        maps = {found.signature: found for engine in self.live() for found in engine.maps}
        opaque = {name for found in maps.values() for name in found.opaque}
        return incoming, incoming.stage(maps, opaque, self._folder, self._run.run_id)

    async def offer_bucket(self, bucket: Bucket, first: bool) -> int:
        """A part of a whole version, the `first` or a further one; its bytes."""
        self._buckets = [bucket] if first else [*self._buckets, bucket]
        return sum(tensor.nbytes for _, tensor in bucket)

    async def offer_whole(self, label: str) -> None:
        """The buckets since the first are the version `label`."""
        async with self._offering():
            buckets, self._buckets = self._buckets, []
            incoming = await asyncio.to_thread(IncomingWhole, self.served, buckets, label)
            self._actions = Actions(self._cfg, self.served, incoming, {})

    async def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        """Do these side by side; one answer each, after `timeout_s` or soon afterwards."""
        return await self._offered(label).perform(actions, {engine.endpoint.name: engine for engine in self._engines()}, timeout_s)

    async def advance(self, label: str) -> str:
        """The host copy becomes the version that every engine has proven. Returns why the last anchor could not be written, if so."""
        async with self._turn:
            failed = await self.anchor_written()
            await asyncio.to_thread(self._offered(label).incoming.apply)
            self._forget()
            self._unoffered.set()
            return failed

    async def give_up(self, label: str) -> None:
        """The version that was offered, if it was, is not published: no engine goes on with it."""
        async with self._turn:
            self._forget()
            self._buckets = []
            self._unoffered.set()

    async def write_anchor(self, manifest_json: str) -> None:
        """Begin to write what the host copy holds whole to the run's files. The host copy does not change before that has ended."""
        async with self._turn:  # it may still be becoming that version
            assert self._anchor is None, "advance waits for an anchor"
            self._anchor = asyncio.create_task(asyncio.to_thread(self._write_anchor, Manifest.from_json(manifest_json)))

    async def anchor_written(self) -> str:
        """Wait for the anchor that is being written; why it could not be, if so."""
        task, self._anchor = self._anchor, None
        if task is None:
            return ""
        try:
            await task
        except (OSError, ValueError, RuntimeError) as error:
            return f"an anchor could not be written, the chain of deltas goes on without: {error}"
        return ""

    def _write_anchor(self, manifest: Manifest) -> None:
        copy, run = self.copy, self._run
        whole = anchor(Weights(copy.spec, run.run_id, [copy.bits(i) for i in range(len(copy.spec.tensors))]), manifest)
        signed = sign(whole.manifest, run.key) if manifest.mac else whole.manifest
        WeightStore(open_store(run.url, self._cfg.sync.timeout_s), run.run_id).add(signed, whole.parts)

    def _offered(self, label: str) -> Actions:
        assert self._actions is not None and self._actions.incoming.label == label, f"{label} was not offered"
        return self._actions

    def _forget(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)
        if self._actions is not None and isinstance(self._actions.incoming, IncomingDelta):
            self._actions.incoming.forget()
        self._actions, self._paths = None, {}
