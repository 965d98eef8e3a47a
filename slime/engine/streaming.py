"""Which tokens came from which weights, where SGLang does not tell (before 0.5.19): read from a stream of the answer.

Every chunk of a stream holds all tokens so far and the version that the engine holds when it is sent. Tokens that appear first in a chunk
are counted to that chunk's version: exact to the tokens of one chunk, about one decoding step, on either side of an update.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import orjson

from slime.engine.errors import EngineError, Garbage

PREFIX, END = b"data:", b"[DONE]"


async def chunks(lines: AsyncIterable[bytes], engine: str) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. Raises EngineError for an error that the server sends in it, Garbage for what is
    no JSON."""
    async for line in lines:
        if not line.startswith(PREFIX):
            continue
        data = line.removeprefix(PREFIX).strip()
        if data == END:
            return
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise Garbage(f"{engine} sent {data[:100]!r} in a stream, which is no JSON") from error
        if "error" in chunk:
            raise EngineError(f"{engine} refused a request: {str(chunk['error'])[:500]}")
        yield chunk


def spans(progress: Iterable[tuple[int, str]]) -> list[dict[str, Any]]:
    """Spans as later versions of SGLang give them, from (tokens so far, version) of every chunk: {"version", "start", "end"}."""
    found: list[dict[str, Any]] = []
    for tokens, version in progress:
        start = found[-1]["end"] if found else 0
        if found and found[-1]["version"] == version:
            found[-1]["end"] = tokens
        elif tokens > start:
            found.append({"version": version, "start": start, "end": tokens})
    return found


async def whole(lines: AsyncIterable[bytes], engine: str) -> dict[str, Any]:
    """The last chunk of a stream, as an answer that was not streamed looks, with meta_info.weight_versions. Raises Garbage for a stream
    without one."""
    progress: list[tuple[int, str]] = []
    last: dict[str, Any] | None = None
    async for last in chunks(lines, engine):
        try:
            progress.append((len(last["output_ids"]), last["meta_info"]["weight_version"]))
        except (KeyError, TypeError) as error:
            raise Garbage(f"{engine} sent a piece of a stream that is none of an answer: {type(error).__name__}: {error}") from error
    if last is None:
        raise Garbage(f"{engine} ended a stream without an answer")
    last["meta_info"]["weight_versions"] = spans(progress)
    return last
