"""Token versions out of a stream, as SGLang before 0.5.19 is asked."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from slime.engine.errors import EngineError
from slime.engine.streaming import spans, whole


def test_tokens_belong_to_the_version_of_the_chunk_that_first_shows_them() -> None:
    assert spans([(1, "a"), (2, "a"), (4, "b"), (5, "b"), (6, "c")]) == [
        {"version": "a", "start": 0, "end": 2},
        {"version": "b", "start": 2, "end": 5},
        {"version": "c", "start": 5, "end": 6},
    ]


def test_a_chunk_without_new_tokens_is_no_span() -> None:
    assert spans([(0, "a"), (3, "b"), (3, "c"), (3, "c")]) == [{"version": "b", "start": 0, "end": 3}]
    assert spans([]) == []


def stream(*events: str) -> AsyncIterator[bytes]:
    async def lines() -> AsyncIterator[bytes]:
        for event in events:
            yield event.encode() + b"\n"
            yield b"\n"

    return lines()


def chunk(ids: list[int], version: str) -> str:
    return "data: " + json.dumps({"output_ids": ids, "text": "x", "meta_info": {"weight_version": version}})


def test_the_last_chunk_is_the_answer() -> None:
    events = (chunk([5], "r/0/1"), chunk([5, 6], "r/0/1"), chunk([5, 6, 7], "r/0/2"), "data: [DONE]")
    answer = asyncio.run(whole(stream(*events), "engine 0"))
    assert answer["output_ids"] == [5, 6, 7]
    assert [(s["version"], s["start"], s["end"]) for s in answer["meta_info"]["weight_versions"]] == [("r/0/1", 0, 2), ("r/0/2", 2, 3)]


def test_errors_in_a_stream() -> None:
    with pytest.raises(EngineError, match=r"engine 0 refused a request: .*too long"):
        asyncio.run(whole(stream('data: {"error": {"message": "too long"}}'), "engine 0"))
    with pytest.raises(EngineError, match="engine 0 ended a stream without an answer"):
        asyncio.run(whole(stream("data: [DONE]"), "engine 0"))
