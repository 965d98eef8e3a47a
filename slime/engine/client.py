"""The asynchronous client of the engines: token ids in, token ids and log-probs out."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, Self

import aiohttp

from slime.engine import streaming
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, StaleWeights
from slime.engine.generation import Generation, Sampling, check_ids, parse
from slime.engine.routing import Router
from slime.engine.versions import Facts, facts
from slime.models.map import Routing
from slime.types import WeightVersion

__all__ = ["EngineClient", "Generation", "Sampling"]

log = logging.getLogger(__name__)

KEEPALIVE_S = 3.0  # below the 5 s after which SGLang closes an idle connection, so that a request never meets a closing one
ABORT_S = 5.0
RID = re.compile(r"[0-9a-f]{32}")  # engines abort by prefix of the id, so all have one length


class EngineClient:
    """Several engines as one. Make it where an event loop runs; `expect` before the first request.

    Retried is only what no engine has accepted: a connection refused. The engine is then dead and another one gets the request. An answer
    that does not come, or a connection that breaks, is the caller's to judge.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], *, vocab_size: int, timeout_s: float, max_in_flight: int, pause: str = "drain"
    ) -> None:
        """`timeout_s` for one answer; `max_in_flight` requests under way, further ones wait here. `pause` is sync.pause: unless it is
        drain, an answer may come from several versions, the one that was expected when it was asked for and later ones."""
        self.endpoints = list(endpoints)
        self.router = Router([e.name for e in self.endpoints])
        self._facts: list[Facts] = [facts(e.sglang, e.name) for e in self.endpoints]
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(max_in_flight)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout_s))
        self._pause = pause
        self._expected: str | None = None

    async def expect(self, label: str) -> None:
        """Use engines that hold the weights `label`, and answers that come from them alone.

        Raises StaleWeights naming an engine that holds others; it is fenced.
        """
        self._expected = label
        held = await asyncio.gather(*(Control(e, self._session).label() for e in self.endpoints))
        for i, found in enumerate(held):
            if found == label:
                self.router.ready(i)
            else:
                self.router.fence(i, f"it holds weights {found}, expected {label}")
        stale = [f"{e.name} holds weights {found}" for e, found in zip(self.endpoints, held, strict=True) if found != label]
        if stale:
            raise StaleWeights(f"{', '.join(stale)}; expected {label}")

    def add(self, endpoint: Endpoint) -> None:
        """One more engine; it gets requests after an `expect` that finds the expected weights in it."""
        self._facts.append(facts(endpoint.sglang, endpoint.name))
        self.endpoints.append(endpoint)
        self.router.add(endpoint.name)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str | None = None,
        session: int | None = None,
        routing: Routing | None = None,
    ) -> Generation:
        """One answer. Requests of one `session` go to one engine, whose cache holds what they have in common. With `routing`, the answer
        says which experts every token went to.

        `rid` is 32 hexadecimal digits, made here by default. Raises ValueError for ids outside the vocabulary, TimeoutError naming
        rollout.request_timeout_s, EngineLost where the connection broke, EngineError for a refusal, StaleWeights for other weights.
        """
        check_ids(prompt_ids, self._vocab_size)
        rid = rid or uuid.uuid4().hex
        if not RID.fullmatch(rid):
            raise ValueError(f"rid={rid}: a request id is 32 hexadecimal digits")
        body = {"rid": rid, "input_ids": list(prompt_ids), "sampling_params": sampling.to_sglang(), "return_logprob": True}
        if routing is not None:
            body["return_routed_experts"] = True
        if self._pause == "in_place" and self._expected:  # prefixes of older weights stay in the cache: under another name
            body["extra_key"] = self._expected
        async with self._slots:
            while True:
                engine = self.router.acquire(session)
                try:
                    return await self._ask(engine, body, routing)
                except aiohttp.ClientConnectorError as error:
                    self.router.dead(engine, f"it does not accept connections at {self.endpoints[engine].url} ({error.os_error})")
                    log.warning("%s does not accept connections; its requests go to the others", self.endpoints[engine].name)
                finally:
                    self.router.release(engine)

    async def close(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, engine: int, body: dict[str, Any], routing: Routing | None) -> Generation:
        endpoint, started_s, since = self.endpoints[engine], time.time(), self._expected
        spans = self._facts[engine].version_spans
        streams = not spans and self._pause != "drain"
        body = body | {"stream": streams}
        try:
            async with self._session.post(endpoint.url + "/generate", json=body, headers=endpoint.headers) as response:
                if response.status != 200:
                    raise EngineError(f"{endpoint.name} refused a request: {response.status} {(await response.text())[:500]}")
                answer = await (streaming.whole(response.content, endpoint.name) if streams else response.json())
        except aiohttp.ClientConnectorError:
            raise
        except asyncio.CancelledError:
            await self._abort(endpoint, body["rid"])
            raise
        except TimeoutError as error:
            await self._abort(endpoint, body["rid"])
            raise TimeoutError(f"{endpoint.name} gave no answer after {self._timeout_s:g} s (rollout.request_timeout_s)") from error
        except aiohttp.ClientError as error:
            self.router.dead(engine, f"its connection broke ({error or type(error).__name__})")
            raise EngineLost(f"{endpoint.name} at {endpoint.url} was lost while it generated: {error or type(error).__name__}") from error
        generation = parse(answer, spans or streams, endpoint.name, started_s, time.time(), routing)
        self._check_versions(engine, generation, since)
        return generation

    def _check_versions(self, engine: int, generation: Generation, since: str | None) -> None:
        """`since` is what was expected when the request was sent."""
        stale = {span.version for span in generation.versions if not self._may_answer(span.version, since)}
        if stale:
            message = f"{generation.engine} answered with weights {', '.join(sorted(stale))}, expected {since}"
            self.router.fence(engine, message)
            raise StaleWeights(message)

    def _may_answer(self, label: str, since: str | None) -> bool:
        if label == since or self._pause == "drain" or since is None:
            return label == since
        try:
            held, asked = WeightVersion.parse(label), WeightVersion.parse(since)
        except ValueError:  # not a version of ours
            return False
        return held.run_id == asked.run_id and held > asked

    async def _abort(self, endpoint: Endpoint, rid: str) -> None:
        """Tell the engine that nobody waits for this answer. It may be past hearing."""
        try:
            await self._session.post(
                endpoint.url + "/abort_request", json={"rid": rid}, headers=endpoint.headers, timeout=aiohttp.ClientTimeout(ABORT_S)
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("%s did not take the abort of a request: %s", endpoint.name, error or type(error).__name__)
