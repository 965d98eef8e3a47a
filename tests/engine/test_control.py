"""Control calls whose answers are none: errors with names, which nothing that waits for an engine ends by. No engine, but a real server."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from slime.config.rollout import RolloutConfig
from slime.engine import health
from slime.engine.client import EngineClient
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, Garbage
from slime.engine.health import Kind, Trouble, Turn
from slime.engine.live import LiveEngine
from slime.engine.routing import State
from slime.engine.tending import Tending
from tests.rollout.double import LABEL, Double

BAD = {
    "no JSON": ('{"weight_version": ', "which cannot be read"),
    "no UTF-8": (b'{"weight_version": "\xff"}', "which cannot be read"),
    "another field": ('{"error": "busy"}', "without weight_version"),
    "null": ('{"weight_version": null}', "without weight_version"),
    "no object": ("[1, 2]", "without weight_version"),
}


@dataclass
class Talking(Double):
    """Its answer to every question but generate: `status` and `body`, where there is one."""

    body: str | bytes = ""
    status: int = 200

    async def model_info(self, request: web.Request) -> web.Response:
        if not self.body:
            return await super().model_info(request)
        data = self.body if isinstance(self.body, bytes) else self.body.encode()
        return web.Response(body=data, status=self.status, content_type="application/json")


def talking(body: str | bytes = "", status: int = 200, name: str = "engine 0") -> Talking:
    return Talking(lambda asked: "yes", name, body=body, status=status)


def with_client(doubles: list[Talking], do: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            served = [double.serving() for double in doubles]
            endpoints = [await one.__aenter__() for one in served]
            async with EngineClient(endpoints, vocab_size=80, timeout_s=5, max_in_flight=10) as client:
                await do(client)
            for one in served:
                await one.__aexit__(None, None, None)

    asyncio.run(run())


@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD)
def test_an_answer_that_is_none_is_garbage(body: str | bytes, says: str) -> None:
    async def ask() -> None:
        async with talking(body).serving() as endpoint, aiohttp.ClientSession() as session:
            with pytest.raises(Garbage, match=f"engine 0 answered /model_info with .*{says}"):
                await Control(endpoint, session).label()

    asyncio.run(ask())


@pytest.mark.parametrize("answer", [{}, {"loads": None}, {"loads": [{}]}, {"loads": ["no"]}, {"loads": [{"num_running_reqs": 1}]}], ids=str)
def test_loads_that_count_nothing_are_garbage(answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Answering(Control):
        async def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float = 1.0) -> Any:
            return answer

    with pytest.raises(Garbage, match="engine 0 answered /v1/loads with "):
        asyncio.run(Answering(Endpoint("http://none", "", "engine 0", ""), None).running())  # type: ignore[arg-type]


@pytest.mark.parametrize(("body", "status"), [*((body, 200) for body, _ in BAD.values()), ("{}", 404), ("{}", 500)])
def test_an_engine_that_does_not_say_what_it_holds_is_left_out_and_told(body: str | bytes, status: int) -> None:
    """The others are used; its host agent hears of it, once for each time that it is said to be back."""
    bad = talking(body, status)

    async def do(client: EngineClient) -> None:
        await client.expect(LABEL)
        assert [slot.state for slot in client.router.slots] == [State.DEAD, State.READY]
        for life in range(3):
            [trouble] = client.troubles()
            assert (trouble.engine, trouble.kind, trouble.life) == ("engine 0", Kind.GARBAGE, life) and "/model_info" in trouble.reason
            client.engines([Turn("engine 0", health.State.HEALTHY, "it is back", life + 1)])
            await client._admitting[0]
            assert client.router.slots[0].state is State.DEAD, "and not FENCED, without anybody who knows"
        bad.body = ""
        client.engines([Turn("engine 0", health.State.HEALTHY, "it is back", 4)])
        await client._admitting[0]
        assert client.router.slots[0].state is State.READY

    with_client([bad, talking(name="engine 1")], do)


def test_an_engine_that_breaks_off_is_told_each_time_that_it_is_back() -> None:
    """Of one life: its agent's probes find it well."""

    async def do(client: EngineClient) -> None:
        await client.expect(LABEL)
        client.endpoints[0] = Endpoint("http://127.0.0.1:9", "", "engine 0", "0.5.23")
        client.router.dead(0, "suspect")
        for _ in range(2):
            client.engines([Turn("engine 0", health.State.HEALTHY, "it answers", 0)])
            await client._admitting[0]
            assert [trouble.kind for trouble in client.troubles()] == [Kind.LOST]

    with_client([talking()], do)


def test_a_task_that_nobody_awaits_does_not_end_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: EngineClient, engine: int) -> str:
        raise ZeroDivisionError("a defect")

    async def do(client: EngineClient) -> None:
        await client.expect(LABEL)
        client.router.dead(0, "suspect")
        monkeypatch.setattr(EngineClient, "_label", broken)
        client.engines([Turn("engine 0", health.State.HEALTHY, "it answers", 0)])
        await asyncio.sleep(0.05)
        with pytest.raises(ZeroDivisionError, match="a defect"):
            client.troubles()

    with_client([talking()], do)


def test_an_engine_that_answers_nonsense_while_it_catches_up_is_tried_again_and_then_given_up() -> None:
    """It is not retired at the first time, and what tends it goes on."""

    async def run(body: str) -> list[Turn]:
        double = talking(body)
        double.tells = False  # no probe is answered
        async with double.serving() as endpoint, aiohttp.ClientSession() as session, asyncio.timeout(20):

            async def bring(engine: LiveEngine) -> None:
                await engine.label()

            async def start(spec: Any) -> LiveEngine:
                raise AssertionError("a server of the user's")

            tending = Tending(RolloutConfig(max_restarts=2), bring, start)
            engine = LiveEngine(endpoint, 1, session)
            tending.add(engine)
            tending.proven(["engine 0"])
            tending.report([Trouble("engine 0", Kind.STALE, "holds weights run/0/3", 0)])
            while tending._tended["engine 0"].health.state is not health.State.DEAD:
                await asyncio.sleep(0.02)
            _, turns = await tending.news(0, 0.0)
            await tending.stop()
            return turns

    for body, says in BAD.values():
        turns = asyncio.run(run(body))  # type: ignore[arg-type]
        assert [turn.state.value for turn in turns] == ["healthy", "stale", "dead"]
        assert re.search(f"did not come to hold the committed weights: engine 0 answered /model_info with .*{says}", turns[-1].reason)


def test_what_is_lost_is_no_garbage_and_both_are_the_engine_s() -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(EngineLost, match=r"engine 0 at http://127\.0\.0\.1:9 was lost during /model_info"):
                await Control(Endpoint("http://127.0.0.1:9", "", "engine 0", ""), session).label()

    asyncio.run(ask())
    assert issubclass(Garbage, EngineError) and not issubclass(Garbage, EngineLost)
