"""A server that misbehaves as asked. For what a real engine cannot be made to do on demand; real answers are tested in test_e2e.py."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from slime.engine.endpoint import Endpoint

LABEL = "run/0/0"


@dataclass
class Double:
    """`behave(request body)` names what happens: a text to answer with, or one of stale, die, hang, abort, refuse, error, cut, odd, alien,
    nan, long."""

    behave: Callable[[dict[str, Any]], str]
    name: str = "engine 0"
    asked: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)  # request ids
    tells: bool = True  # whether it says anything of itself
    runs: int | None = None  # requests at once, as it says
    takes_s: float = 0.0  # for an answer
    running: int = 0
    most: int = 0  # that ran at once

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": LABEL})

    async def server_info(self, request: web.Request) -> web.Response:
        if not self.tells:
            raise web.HTTPNotFound
        states = [] if self.runs is None else [{"effective_max_running_requests_per_dp": self.runs}]
        return web.json_response({"version": "0.5.23", "tp_size": 1, "internal_states": states})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.takes_s)
        self.running -= 1
        what = self.behave(body)
        if what == "die":
            assert request.transport is not None
            request.transport.close()
        if what == "hang":
            await asyncio.sleep(30)
        if what == "refuse":
            return web.json_response({"error": {"message": "no such parameter"}}, status=400)
        if what == "error":
            return web.json_response({"error": {"message": "an assertion"}}, status=500)
        if what in ("cut", "odd"):
            return web.Response(text='{"text": "' if what == "cut" else '{"text": "yes"}', content_type="application/json")
        return web.json_response(self.answer(body, what))

    async def abort_request(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    def answer(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        ids = [5, 6, 999 if what == "alien" else 1]
        return {
            "text": what,
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": {"abort": "abort", "long": "length"}.get(what, "stop")},
                "output_token_logprobs": [[None if what == "nan" and i == 6 else -0.1, i, None] for i in ids],
                "weight_version": LABEL,
                "weight_versions": [{"version": "run/0/9" if what == "stale" else LABEL, "start": 0, "end": len(ids)}],
                "prompt_tokens": len(body["input_ids"]),
                "cached_tokens": 0,
                "e2e_latency": 0.001,
                "response_sent_to_client_ts": 1000.0,
            },
        }

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Endpoint]:
        app = web.Application()
        app.router.add_get("/model_info", self.model_info)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort_request)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}", "key", self.name, "0.5.23")
        await runner.cleanup()
