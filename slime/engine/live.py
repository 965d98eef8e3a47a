"""One engine that takes weights: the calls of an update, in their order, and what its ranks say of it.

Inside the pause SGLang is asked at most five things: pause, begin and end of a session (where this version has them), one update, continue;
before 0.5.21, without sessions, also to drop cached prefixes. What became of the update is asked of the ranks over their own sockets:
SGLang says "Success" whatever happens.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, StaleWeights
from slime.engine.server import Server
from slime.engine.settings import LOADER
from slime.engine.versions import facts
from slime.sync import buckets
from slime.sync.inserver_client import RankClient, RankError, RankReply, command
from slime.sync.livemap import LiveMap
from slime.sync.proof import Proof
from slime.sync.protocol import Bucket
from slime.sync.records import ModelSpec
from slime.sync.states import Receiver

IDLE_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Written:
    """What the ranks found after a write."""

    fingerprints: list[list[int]]  # [rank][move of its live map]
    errors: list[str]  # of ranks that could not do it, or found what must not be
    write_s: float
    audit_s: float


class LiveEngine:
    """A server that answers, ours (`server`) or the user's. `ranks` are its tensor-parallel ranks. `state` is what it holds."""

    def __init__(self, endpoint: Endpoint, ranks: int, session: aiohttp.ClientSession, server: Server | None = None) -> None:
        self.endpoint = endpoint
        self.ranks = ranks
        self.server = server
        self.facts = facts(endpoint.sglang, endpoint.name)
        self.maps: list[LiveMap] = []
        self.on_device = False
        self.proof: Proof | None = None
        self.state: Receiver | None = None
        self.lost = ""  # why an update has given it up
        self.released = False  # it has given up its memory, and has not been loaded since
        self._links: list[RankClient] = []
        self._control = Control(endpoint, session)

    # --- life ------------------------------------------------------------------------------------------------------

    async def probe(self, timeout_s: float) -> str:
        """Why it does not answer, HTTP server and scheduler both; empty where it does."""
        if self.server is not None and not self.server.alive:
            return "its process ended"
        try:
            await self._control.info(timeout_s)
        except (EngineError, TimeoutError, ValueError) as error:
            return str(error)
        return ""

    def died(self) -> None:
        """What it held is gone."""
        if self.state is not None:
            self.state.died()

    async def release(self, timeout_s: float) -> None:
        """Give up the memory of everything that was learned, whatever goes on: it stays paused and holds nothing. Its map stays right,
        since addresses stay. Waits until nothing runs; to be called with a deadline."""
        await self.halt()
        while not await self._control.try_flush():  # where it still works, `release` would end its scheduler
            await asyncio.sleep(IDLE_POLL_S)
        self.released = True
        if self.state is not None:
            self.state.released()
        await self._control.release(timeout_s)

    async def take_back(self, timeout_s: float) -> None:
        """Have the memory again, paused; what lies in it is nobody's weights."""
        assert self.released, "nothing was given up"
        await self._control.take_back(timeout_s)

    # --- the map ----------------------------------------------------------------------------------------------------

    async def learn(self, spec: ModelSpec, spec_file: Path, travels: str, run_id: str, socket: Path, timeout_s: float) -> Written:
        """Paused: let every rank learn where it keeps the tensors of `spec`, and hash everything. `travels`: signature of what is sent.

        Raises ValueError for an engine whose weights cannot be followed, EngineError for one that was not started with the loader or whose
        sockets are not on this host.
        """
        self._links = [RankClient(f"{socket}.{rank}", f"{self.endpoint.name} rank {rank}") for rank in range(self.ranks)]
        written = await self._write("learn", None, False, timeout_s, socket=str(socket), spec=str(spec_file), run_id=run_id)
        if written.errors:
            raise ValueError(f"{self.endpoint.name} cannot follow deltas: {'; '.join(written.errors)}; set sync.mode=full")
        described = await asyncio.gather(*(link.describe(timeout_s) for link in self._links))
        drafts = max(found.models for found in described) - 1
        if drafts:
            raise ValueError(f"{self.endpoint.name} serves {drafts} draft models beside its own, which get no weights; switch them off")
        self.maps, self.on_device = [found.map for found in described], described[0].on_device
        self.proof = Proof(spec, self.maps, self.endpoint.name)
        self.state = Receiver(self.endpoint.name, run_id, travels)
        return written

    def forget(self, spec: ModelSpec, run_id: str) -> None:
        """It cannot be followed: it is loaded whole, and believed."""
        self._links, self.maps, self.proof = [], [], None
        self.state = Receiver(self.endpoint.name, run_id, spec.signature)

    # --- a delta ----------------------------------------------------------------------------------------------------

    async def stage(self, paths: Mapping[str, Path], version: str, parent: str, timeout_s: float) -> int:
        """Every rank takes its staged file (by the signature of its live map); returns the bytes. Raises EngineError where one refuses."""
        chosen = [paths[found.signature] for found in self.maps]
        await asyncio.gather(*(link.stage(str(path), version, parent, timeout_s) for link, path in zip(self._links, chosen, strict=True)))
        return sum(path.stat().st_size for path in chosen)

    async def drop(self, version: str, timeout_s: float) -> None:
        """Every rank forgets what it staged."""
        await asyncio.gather(*(link.drop(version, timeout_s) for link in self._links))

    async def pause(self, how: str, timeout_s: float) -> None:
        """Stop decoding; `how` is sync.pause. Raises TimeoutError where `drain` waits too long."""
        if how == "drain":
            await self._drain(timeout_s)
        else:
            await self._control.pause(how)

    async def halt(self) -> None:
        """Stop decoding whatever goes on, so that everything may be loaded and flushed: running requests begin anew afterwards or, before
        SGLang 0.5.21, are cut short."""
        await self._control.pause("retract")  # first in any case: where it is paused in place already, running requests cannot be aborted
        if not self.facts.flush_while_retracted:
            await self._control.pause("abort")

    async def label(self) -> str:
        """What SGLang calls the weights that it holds."""
        return await self._control.label()

    async def flush(self) -> None:
        """Drop every cached prefix, with nothing running (see `halt`)."""
        if not self.facts.flush_while_retracted:
            await self._control.flush()
        elif not await self._control.try_flush():  # queued requests do not hinder it, but it would wait for them
            raise EngineError(f"{self.endpoint.name} does not drop its cached prefixes: a request of its own still works; try again")

    async def _drain(self, timeout_s: float) -> None:
        """Pause with nothing running. A request may come between the last look and the pause, and one whose prompt is being computed is
        counted nowhere: it goes back into the queue or, before SGLang 0.5.21, is waited for. There cached prefixes are dropped here."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not await self._control.running():
                if self.facts.flush_while_retracted:
                    await self._control.pause("retract")
                    return
                await self._control.pause("in_place")
                if await self._control.try_flush():
                    return
                await self._control.resume()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.endpoint.name} still has requests after {timeout_s:g} s (sync.timeout_s, sync.pause=drain)")
            await asyncio.sleep(IDLE_POLL_S)

    async def commit(self, version: str, parent: str, opaque: Path | None, flush: bool, timeout_s: float) -> Written:
        """Write what was staged, paused; `opaque` are tensors that it loads whole. `flush`: drop cached prefixes, unless `pause` has."""
        return await self._write(
            "commit", version, flush and self.facts.flush_while_retracted, timeout_s, version=version, parent=parent, load=_text(opaque)
        )

    async def undo(self, version: str, parent: str, opaque: Path | None, timeout_s: float) -> Written:
        """Write the old bits back. Cached prefixes, if there are any, are of these weights."""
        return await self._write("undo", parent, False, timeout_s, version=version, load=_text(opaque))

    async def resume(self) -> None:
        """Go on decoding."""
        await self._control.resume()

    async def audit(self, timeout_s: float) -> Written:
        """What it holds now; requests go on afterwards."""
        await self._control.pause("in_place")
        try:
            return await self._write("audit", None, False, timeout_s)
        finally:
            await self._control.resume()

    # --- everything -------------------------------------------------------------------------------------------------

    async def load_whole(self, found: Iterable[Bucket], version: str, timeout_s: float) -> Written:
        """All tensors through SGLang's own update, with nothing running (see `halt`), and without prefixes of other weights afterwards;
        then hash everything, if it could be learned where that is."""
        async with self._session():
            coming = buckets.together(found)
            while bucket := await asyncio.to_thread(next, coming, None):
                payload = await asyncio.to_thread(buckets.serialise, bucket)
                await self._control.update([payload] * self.ranks, None, flush=False, timeout_s=timeout_s)
        together = bool(self._links) and self.facts.flush_while_retracted
        if not together:  # before 0.5.21 an update that flushes ends a server that still has a request
            await self.flush()
        if self._links:
            return await self._write("audit", version, together, timeout_s, version=version)
        await self.relabel(version)
        return Written([], [], 0.0, 0.0)

    async def relabel(self, label: str) -> None:
        """Call the weights that it loaded itself `label`. Raises StaleWeights where it goes on calling them otherwise."""
        await self._control.relabel(label)
        held = await self._control.label()
        if held != label:
            raise StaleWeights(f"{self.endpoint.name} holds weights {held}, expected {label}")

    # --- helpers ----------------------------------------------------------------------------------------------------

    async def _write(self, op: str, label: str | None, flush: bool, timeout_s: float, **fields: str | None) -> Written:
        """A command, as an update of one empty tensor that is named by it, and what every rank says of it."""
        import torch

        number = f"{op}-{uuid.uuid4().hex}"  # nobody else's reply can answer for it
        payload = buckets.serialise([(command(op, id=number, **fields), torch.empty(0))])
        async with self._session():
            await self._control.update([payload] * self.ranks, label, flush, timeout_s, LOADER)
        try:
            replies = await asyncio.gather(*(link.result(number, timeout_s) for link in self._links))
        except RankError as error:
            raise EngineError(f"{error}; start it on this host with --custom-weight-loader {LOADER}") from error
        return Written(
            [list(reply.moves) for reply in replies],
            [f"rank {rank}: {said}" for rank, reply in enumerate(replies) if (said := _complaint(reply))],
            max(reply.seconds.get("write_s", 0.0) for reply in replies),
            max(reply.seconds.get("audit_s", 0.0) for reply in replies),
        )

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        """An update session, where this version has them. One that a driver left open when it died is closed first."""
        if not self.facts.update_session:
            yield
            return
        try:
            await self._control.begin()
        except EngineError as refused:
            if isinstance(refused, EngineLost) or not await self._close_left_open():
                raise
            await self._control.begin()
        try:
            yield
        finally:
            await self._control.end()

    async def _close_left_open(self) -> bool:
        """Close the session that is open; False where none is."""
        try:
            await self._control.end()
        except EngineLost:
            raise
        except EngineError:
            return False
        return True


def _complaint(reply: RankReply) -> str:
    """What a rank could not do, or what it found."""
    if reply.error:
        return reply.error
    return f"{', '.join(reply.changed[:4])} changed unasked" if reply.changed else ""


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
