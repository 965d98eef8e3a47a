"""The control calls of one SGLang server: pause, update, flush, continue, version, memory. Each is sent once and never again."""

import json
from typing import Any

import aiohttp
import orjson

from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, Garbage

CALL_S = 120.0  # for calls that wait for running requests
ASK_S = 10.0


class Control:
    """Raises EngineError where the server refuses, EngineLost where its connection breaks, Garbage for an answer that is none, TimeoutError
    naming the call."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self.endpoint = endpoint
        self._session = session

    async def info(self, timeout_s: float = ASK_S) -> dict[str, Any]:
        """Everything that the server says of itself: its arguments, `version`, `internal_states`. The last are its scheduler's answer,
        between two steps, also while it is paused: unlike other questions this one shows that it lives."""
        return await self._question("/server_info", timeout_s, version=str, tp_size=int)

    async def label(self) -> str:
        """Label of the weights that it holds."""
        return (await self._question("/model_info", ASK_S, weight_version=str))["weight_version"]

    async def runs(self) -> int | None:
        """How many requests it runs at once, over all of its data parallel ranks; None where it does not say."""
        states = (await self.info()).get("internal_states")
        ranks = [state for state in states if isinstance(state, dict)] if isinstance(states, list) else []
        told = [count for rank in ranks if isinstance(count := rank.get("effective_max_running_requests_per_dp"), int) and count > 0]
        return sum(told) if told and len(told) == len(ranks) else None

    async def running(self) -> int:
        """Requests that it works on or has queued."""
        answer = await self._question("/v1/loads", ASK_S, loads=list)
        try:
            return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in answer["loads"])
        except (KeyError, TypeError) as error:
            raise Garbage(f"{self.endpoint.name} answered /v1/loads with {_short(answer)}, which counts no requests") from error

    async def pause(self, mode: str) -> None:
        """Stop decoding; `mode` is abort, retract or in_place."""
        await self._call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on decoding, with the memory that it has: emptying the allocator's cache takes longer than an update."""
        await self._call("POST", "/continue_generation", {"torch_empty_cache": False})

    async def freeze_gc(self) -> None:
        """Take what the server holds after its start out of Python's garbage collection, which costs 0.3 s in every flush on a CPU."""
        await self._call("POST", "/freeze_gc", {})

    async def flush(self) -> None:
        """Drop every cached prefix."""
        await self._call("POST", f"/flush_cache?timeout={CALL_S / 2:g}", {})

    async def try_flush(self) -> bool:
        """Drop every cached prefix now; False, and nothing dropped, where the server still works on a request."""
        try:
            await self._call("POST", "/flush_cache", {})
        except EngineLost:
            raise
        except EngineError:
            return False
        return True

    async def begin(self) -> None:
        """Open an update session."""
        await self._call("POST", "/begin_weight_update", {})

    async def end(self) -> None:
        """Close the update session."""
        await self._call("POST", "/end_weight_update", {})

    async def update(self, payloads: list[str], label: str | None, flush: bool, timeout_s: float, loader: str | None = None) -> None:
        """Load tensors: `payloads` hold one serialised bucket for each TP rank (see slime.sync.buckets). `loader` is the import path of a
        custom weight loader that takes them."""
        body = {"serialized_named_tensors": payloads, "flush_cache": flush, "weight_version": label, "load_format": loader}
        await self._call("POST", "/update_weights_from_tensor", body, timeout_s)

    async def release(self, timeout_s: float) -> None:
        """Give up the memory of weights, KV cache and CUDA graphs, with nothing running (else its scheduler ends); cached prefixes are
        dropped. Does nothing in a server without --enable-memory-saver."""
        await self._call("POST", "/release_memory_occupation", {}, timeout_s)

    async def take_back(self, timeout_s: float) -> None:
        """Have the memory again, with whatever lies in it. Only after `release`: else its scheduler ends."""
        await self._call("POST", "/resume_memory_occupation", {}, timeout_s)

    async def relabel(self, label: str) -> None:
        """Call the weights that it holds `label`."""
        await self._call("POST", "/update_weight_version", {"new_version": label, "abort_all_requests": False})

    async def _question(self, path: str, timeout_s: float, **fields: type) -> dict[str, Any]:
        """An answer that has these fields, of these types."""
        answer = await self._call("GET", path, None, timeout_s)
        missing = [name for name, kind in fields.items() if not isinstance(answer, dict) or not isinstance(answer.get(name), kind)]
        if missing:
            raise Garbage(f"{self.endpoint.name} answered {path} with {_short(answer)}, without {', '.join(missing)}")
        return answer

    async def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float = CALL_S) -> Any:
        name, data = self.endpoint.name, None if body is None else orjson.dumps(body)
        headers = self.endpoint.headers | ({"Content-Type": "application/json"} if data else {})
        try:
            async with self._session.request(
                method, self.endpoint.url + path, data=data, headers=headers, timeout=aiohttp.ClientTimeout(timeout_s)
            ) as response:
                read = await response.read()
                if response.status != 200:
                    raise EngineError(f"{name} refused {path}: {response.status} {read[:500].decode(errors='replace')}")
                is_json = response.content_type == "application/json"
        except TimeoutError as error:
            raise TimeoutError(f"waiting for {name} to answer {path}: nothing after {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineLost(f"{name} at {self.endpoint.url} was lost during {path}: {error or type(error).__name__}") from error
        try:
            answer = json.loads(read) if is_json else {"message": read.decode()}
        except ValueError as error:  # no JSON, no UTF-8
            raise Garbage(f"{name} answered {path} with {read[:100]!r}, which cannot be read") from error
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{name} refused {path}: {answer.get('message')}")
        return answer


def _short(answer: Any) -> str:
    return str(answer)[:100]
