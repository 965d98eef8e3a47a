"""One engine that takes weights: pause, load, prove, continue; or stay fenced."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, StaleWeights
from slime.engine.server import Server
from slime.engine.versions import facts


class LiveEngine:
    """A server that answers, ours (`server`) or the user's. `ranks` are its tensor-parallel ranks.

    A failure in any call fences it: it stays paused, so that it answers nothing, until an update succeeds from begin to commit.
    """

    def __init__(self, endpoint: Endpoint, ranks: int, session: aiohttp.ClientSession, server: Server | None = None) -> None:
        self.endpoint = endpoint
        self.ranks = ranks
        self.server = server
        self.facts = facts(endpoint.sglang, endpoint.name)
        self.fenced: str | None = None  # why
        self._control = Control(endpoint, session)
        self._session_open = False

    async def begin(self) -> None:
        """Pause, and open an update session where this version has them.

        A session that a driver left open when it died is closed first: what it loaded is loaded over, and the label proves it.
        """
        async with self._fenced_on_failure():
            await self._control.pause(self.facts.pause_mode)
            if self.facts.update_session and not self._session_open:
                await self._open_session()
                self._session_open = True

    async def _open_session(self) -> None:
        try:
            await self._control.begin()
        except EngineError as refused:
            if isinstance(refused, EngineLost) or not await self._close_left_open():
                raise
            await self._control.begin()

    async def _close_left_open(self) -> bool:
        """Close the session that is open; False where none is."""
        try:
            await self._control.end()
        except EngineLost:
            raise
        except EngineError:
            return False
        return True

    async def load(self, payload: str, label: str | None, timeout_s: float) -> int:
        """Load a serialised bucket, recording `label` with it. Returns the bytes sent."""
        async with self._fenced_on_failure():
            await self._control.update([payload] * self.ranks, label, flush=False, timeout_s=timeout_s)
        return len(payload) * self.ranks

    async def commit(self, label: str) -> None:
        """Close the session, drop prefixes of the old weights, and go on if it reports `label`. Raises StaleWeights if not."""
        async with self._fenced_on_failure():
            if self._session_open:
                await self._control.end()
                self._session_open = False
            await self._control.flush()
            await self._prove(label)
            await self._control.resume()
        self.fenced = None

    async def relabel(self, label: str) -> None:
        """Call the weights that it loaded itself `label`."""
        async with self._fenced_on_failure():
            await self._control.relabel(label)
            await self._prove(label)

    async def _prove(self, label: str) -> None:
        held = await self._control.label()
        if held != label:
            raise StaleWeights(f"{self.endpoint.name} holds weights {held}, expected {label}: it is paused and gets no requests")

    @asynccontextmanager
    async def _fenced_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except (EngineError, TimeoutError) as error:
            self.fenced = str(error)
            raise
