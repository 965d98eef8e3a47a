"""A teacher that misbehaves as asked. For what a real server cannot be made to do on demand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from slime.engine.endpoint import Endpoint

VOCAB = 80


@dataclass
class TeacherDouble:
    """`behave(request body)` names what happens: well, or one of die, hang, error, busy, refuse, cut, odd, abort, nan, positive, others,
    short, few, same, alien."""

    behave: Callable[[dict[str, Any]], str] = lambda body: "well"
    name: str = "teacher math"
    longest: int | None = 10_000
    texts: Callable[[int], str] = str
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.5.23", "tp_size": 1, "max_req_input_len": self.longest})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        what = self.behave(body)
        if what == "die":
            assert request.transport is not None
            request.transport.close()
        if what == "hang":
            await asyncio.sleep(30)
        statuses = {"refuse": 400, "error": 500, "busy": 503}
        if what in statuses:
            return web.json_response({"error": {"message": "too long for me"}}, status=statuses[what])
        if what == "cut":
            return web.Response(text='{"meta_info": ', content_type="application/json")
        return web.json_response({} if what == "odd" else self.answer(body, what))

    def answer(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        """log-prob of token t at any position: -t / 10; the likeliest tokens are 0, 1, 2, ... with -1, -2, -3, ..."""
        ids = body["input_ids"][body["logprob_start_len"] :]
        said: list[list[Any]] = [[-i / 10, i, self.texts(i) if body.get("return_text_in_logprobs") else None] for i in ids]
        said[0][0] = None
        if what in ("nan", "positive"):
            said[-1][0] = None if what == "nan" else 0.5
        if what == "others":
            said[1][1] += 1
        if what == "short":
            said.pop()
        count = body.get("top_logprobs_num", 0) - (what == "few")
        top = [[0 if what == "same" else i, 99 if what == "alien" and not i else i] for i in range(count)]
        rows = [[[-1.0 - i, number, None] for i, (_, number) in enumerate(top)] for _ in ids]
        if what == "same":
            rows[-1][1][1] = rows[-1][0][1]
        return {
            "text": "",
            "output_ids": [],
            "meta_info": {
                "finish_reason": {"type": "abort" if what == "abort" else "length"},
                "input_token_logprobs": said,
                **({"input_top_logprobs": [None, *rows[1:]]} if count else {}),
            },
        }

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[Endpoint]:
        app = web.Application()
        app.router.add_get("/server_info", self.server_info)
        app.router.add_post("/generate", self.generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}", "key", self.name)
        await runner.cleanup()
