"""The asynchronous client of the engines: token ids in, token ids and log-probs out."""

import asyncio
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import aiohttp

from slime.engine import health
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import Aborted, EngineError, EngineLost, Garbage, StaleWeights
from slime.engine.generation import Generation, Sampling, check_answer, check_ids, parse
from slime.engine.health import Kind, Trouble, Turn
from slime.engine.posting import Refused, lasting_session, post_generate
from slime.engine.routing import Router, State
from slime.engine.versions import Facts, facts
from slime.models.map import Routing
from slime.types import WeightVersion

__all__ = ["EngineClient", "Generation", "Sampling"]

log = logging.getLogger(__name__)

ABORT_S = 5.0
ATTEMPTS = 3  # answers that may fail before a request does
ADMIT_S, ADMIT_TRIES = 1.0, 10  # an engine that is back may be a moment ahead of `expect`
RID = re.compile(r"[0-9a-f]{32}")  # engines abort by prefix of the id, so all have one length
KINDS: dict[type[Exception], Kind] = {
    Garbage: Kind.GARBAGE,
    StaleWeights: Kind.STALE,
    EngineLost: Kind.LOST,
    TimeoutError: Kind.LATE,
}  # an answer that was cut short speaks against no engine


class EngineClient:
    """Several engines as one. Make it where an event loop runs; `expect` before the first request.

    A request whose answer is lost, late, garbage, cut short or from other weights is asked again, of another engine where there is one,
    with the same seed and a new id: what was answered in part is thrown away. The engine gets no new requests and is listed in `troubles`,
    for its host agent to look at; it is used again when `engines` is told that it is back. While no engine is ready, requests wait.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        vocab_size: int,
        timeout_s: float,
        max_in_flight: int,
        pause: str = "drain",
        wait_s: float = 0.0,
    ) -> None:
        """`timeout_s` for one answer; `max_in_flight` requests under way, further ones wait here. `pause` is sync.pause: unless it is
        drain, an answer may come from several versions, the one that was expected when it was asked for and later ones. `wait_s`: for an
        engine to be ready."""
        self.endpoints = list(endpoints)
        self.router = Router([e.name for e in self.endpoints])
        self._facts: list[Facts] = [facts(e.sglang, e.name) for e in self.endpoints]
        self._vocab_size = vocab_size
        self._timeout_s, self._wait_s = timeout_s, wait_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._session = lasting_session()
        self._pause = pause
        self._expected: str | None = None
        self._ready = asyncio.Event()  # some engine may be
        self._waiting: deque[asyncio.Future[None]] = deque()  # for an engine that is not full
        self._limits: list[set[asyncio.Timeout]] = [set() for _ in self.endpoints]  # deadlines of the requests under way
        self._admitting: dict[int, asyncio.Task[None]] = {}
        self._noted: set[tuple[int, Kind]] = set()  # told since the engine was ready, or said to be back, last
        self._untold: list[Trouble] = []

    # --- engines ----------------------------------------------------------------------------------------------------

    async def expect(self, label: str) -> None:
        """Use engines that hold the weights `label`, and answers that come from them alone. Engines that are out are not asked.

        Raises StaleWeights where engines answer and none of them holds these weights; those that hold others are fenced in any case.
        """
        self._expected = label
        asked = [i for i, slot in enumerate(self.router.slots) if slot.state is not State.DEAD]
        found = await asyncio.gather(*(self._label(i) for i in asked))
        stale = {
            i: f"{self.endpoints[i].name} holds weights {held}" for i, held in zip(asked, found, strict=True) if held not in (label, None)
        }
        for i, held in zip(asked, found, strict=True):
            if held == label:
                self._open(i)
            elif held is not None:
                self._trouble(i, self.router.slots[i].life, StaleWeights(f"{stale[i]}, expected {label}"))
        if stale and not self.router.open:
            raise StaleWeights(f"{', '.join(stale.values())}; expected {label}")

    def add(self, endpoint: Endpoint) -> None:
        """One more engine; it gets requests after an `expect` that finds the expected weights in it."""
        self._facts.append(facts(endpoint.sglang, endpoint.name))
        self.endpoints.append(endpoint)
        self._limits.append(set())
        self.router.add(endpoint.name)

    def engines(self, turns: Sequence[Turn]) -> None:
        """What became of engines, as their host agents say. One that is out gets nothing, and if it is dead what it was asked is asked of
        others; one that is back gets requests once it says that it holds the expected weights."""
        number = {endpoint.name: i for i, endpoint in enumerate(self.endpoints)}
        for turn in turns:
            engine = number[turn.engine]
            if turn.state is not health.State.HEALTHY:
                self.router.dead(engine, f"{turn.state.value}: {turn.reason}")
                self._look_again()
                if turn.state in (health.State.DEAD, health.State.RETIRED):
                    self._cut(engine)
                continue
            self.router.back(engine, turn.life)
            if self.router.slots[engine].state is State.FENCED and self._expected is not None:
                self._forgive(engine)
                before = self._admitting.get(engine)
                if before is not None:
                    before.cancel()
                self._admitting[engine] = asyncio.create_task(self._admit(engine, turn.life))

    def troubles(self) -> list[Trouble]:
        """What went wrong since the last call; of an engine that is out each kind once. Raises what has ended a task, which is a defect."""
        for task in self._admitting.values():
            if task.done() and not task.cancelled():
                task.result()
        untold, self._untold = self._untold, []
        return untold

    async def _label(self, engine: int) -> str | None:
        """What it says that it holds; None where it does not say."""
        slot, control = self.router.slots[engine], Control(self.endpoints[engine], self._session)
        life = slot.life
        try:
            if slot.runs is None:
                slot.runs = await control.runs()
            return await control.label()
        except (EngineLost, TimeoutError) as error:
            self._trouble(engine, life, error if isinstance(error, EngineLost) else EngineLost(str(error)))
        except EngineError as error:  # none that it may refuse: whoever does is no engine that can be used
            self._trouble(engine, life, Garbage(str(error)))
        return None

    async def _admit(self, engine: int, life: int) -> None:
        """Let an engine that is back have requests."""
        slot = self.router.slots[engine]
        for _ in range(ADMIT_TRIES):
            held = await self._label(engine)
            if slot.life != life or slot.state is not State.FENCED:
                return
            if held == self._expected:
                self._open(engine)
                return
            await asyncio.sleep(ADMIT_S)
        self._trouble(engine, life, StaleWeights(f"{slot.name} is back with weights {held}, expected {self._expected}"))

    def _open(self, engine: int) -> None:
        self.router.ready(engine)
        self._forgive(engine)
        self._ready.set()
        self._look_again()

    def _forgive(self, engine: int) -> None:
        """What goes wrong with it from here on is told anew."""
        self._noted = {(of, kind) for of, kind in self._noted if of != engine}

    def _cut(self, engine: int) -> None:
        """Nobody waits for its answers any more."""
        for limit in self._limits[engine]:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    def _trouble(self, engine: int, life: int, error: Exception) -> None:
        """An engine gets no new requests, unless what is wrong was an earlier life's."""
        slot = self.router.slots[engine]
        kind = next((kind for failure, kind in KINDS.items() if isinstance(error, failure)), None)
        if kind is None or slot.life != life:
            return
        if kind is Kind.STALE:
            self.router.fence(engine, str(error))
        else:
            self.router.dead(engine, str(error))
        if not self.router.open:
            self._look_again()
        trouble = Trouble(slot.name, kind, str(error), life)
        if (engine, kind) not in self._noted:
            self._noted.add((engine, kind))
            self._untold.append(trouble)

    # --- requests ---------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        rid: str | None = None,
        session: int | None = None,
        routing: Routing | None = None,
        scored: int = 0,
    ) -> Generation:
        """One answer. Requests of one `session` go to one engine, whose cache holds what they have in common. With `routing`, the answer
        says which experts every token went to; with `scored`, what the engine thinks of that many last tokens of the prompt, not the first.

        `rid` is 32 hexadecimal digits, made here by default. Raises ValueError for ids outside the vocabulary, EngineError for a refusal,
        EngineLost where no engine is ready in time, and what the last of three answers that failed came to: TimeoutError naming
        rollout.request_timeout_s, EngineLost, Garbage, Aborted, StaleWeights.
        """
        check_ids(prompt_ids, self._vocab_size)
        rid = rid or uuid.uuid4().hex
        if not RID.fullmatch(rid):
            raise ValueError(f"rid={rid}: a request id is 32 hexadecimal digits")
        body = {"rid": rid, "input_ids": list(prompt_ids), "sampling_params": sampling.to_sglang(), "return_logprob": True}
        if routing is not None:
            body["return_routed_experts"] = True
        if scored:
            assert scored < len(prompt_ids), "nothing comes before the first token"
            body["logprob_start_len"] = len(prompt_ids) - scored - 1
        failed: list[str] = []
        async with self._slots:
            while True:
                engine = await self._acquire(session)
                life = self.router.slots[engine].life
                try:
                    answer = await self._ask(engine, body, routing, scored)
                    check_answer(answer, self._vocab_size, sampling.max_new_tokens)
                    return answer
                except (Garbage, Aborted, StaleWeights, EngineLost, TimeoutError) as error:
                    self._trouble(engine, life, error)
                    if not isinstance(error, Refused):
                        failed.append(str(error))
                    if len(failed) == ATTEMPTS:
                        raise type(error)(f"a request failed {ATTEMPTS} times: {'; '.join(failed)}") from error
                finally:
                    self.router.release(engine)
                    self._freed()
                body["rid"] = uuid.uuid4().hex  # the engine may still know the other one

    async def close(self) -> None:
        for task in self._admitting.values():
            task.cancel()
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _acquire(self, session: int | None) -> int:
        """A ready engine that is not full. Raises EngineLost saying each engine's state where none is ready for too long."""
        while True:
            await self._some_engine()
            engine = self.router.acquire(session)
            if engine is not None:
                return engine
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():  # the place is another's
                    self._freed()
                raise

    def _freed(self) -> None:
        """One who waits may look again."""
        while self._waiting:
            if not (first := self._waiting.popleft()).done():
                first.set_result(None)
                return

    def _look_again(self) -> None:
        """All who wait may: another engine is there, or none."""
        while self._waiting:
            self._freed()

    async def _some_engine(self) -> None:
        """Until one is ready; raises EngineLost after `wait_s`."""
        if not self.router.open and self._wait_s:
            try:
                async with asyncio.timeout(self._wait_s):
                    while not self.router.open:
                        self._ready.clear()
                        await self._ready.wait()
            except TimeoutError:
                waited = f"after {self._wait_s:g} s (rollout.start_timeout_s + sync.timeout_s)"
                raise EngineLost(f"no engine can answer {waited}: {self.router.said()}") from None

    async def _ask(self, engine: int, body: dict[str, Any], routing: Routing | None, scored: int) -> Generation:
        endpoint, started_s, since = self.endpoints[engine], time.time(), self._expected
        body = body | ({"extra_key": since} if self._pause == "in_place" and since else {})  # prefixes of older weights stay in the cache
        spans = self._facts[engine].version_spans
        streams = not spans and self._pause != "drain"
        loop = asyncio.get_running_loop()
        late_s = loop.time() + self._timeout_s
        try:
            async with asyncio.timeout_at(late_s) as limit:
                self._limits[engine].add(limit)
                try:
                    answer = await post_generate(self._session, endpoint, body | {"stream": streams}, streams)
                finally:
                    self._limits[engine].discard(limit)
        except asyncio.CancelledError:
            await self._abort(endpoint, body["rid"])
            raise
        except TimeoutError as error:
            if loop.time() < late_s:
                raise EngineLost(f"{endpoint.name} was given up while it generated: {self.router.slots[engine].reason}") from error
            await self._abort(endpoint, body["rid"])
            raise TimeoutError(f"{endpoint.name} gave no answer after {self._timeout_s:g} s (rollout.request_timeout_s)") from error
        generation = parse(answer, spans or streams, endpoint.name, started_s, time.time(), routing, scored)
        if generation.finish_reason == "abort":
            raise Aborted(f"{endpoint.name} aborted a request after {len(generation.output_ids)} tokens; its log says why")
        self._check_versions(engine, generation, since)
        return generation

    def _check_versions(self, engine: int, generation: Generation, since: str | None) -> None:
        """`since` is what was expected when the request was sent."""
        stale = {span.version for span in generation.versions if not self._may_answer(span.version, since)}
        if stale:
            raise StaleWeights(f"{generation.engine} answered with weights {', '.join(sorted(stale))}, expected {since}")

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
