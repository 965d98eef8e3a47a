"""Engine answers made by hand."""

from typing import Any

from slime.engine.generation import Generation
from slime.types import VersionSpan


def answer(ids: list[int], text: str = "", finish_reason: str = "stop", version: str = "r/0/0", **fields: Any) -> Generation:
    known: dict[str, Any] = {
        "output_ids": ids,
        "logprobs": [-0.5 * (i + 1) for i in range(len(ids))],
        "text": text,
        "finish_reason": finish_reason,
        "versions": [VersionSpan(version, 0, len(ids))],
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "engine": "engine 0",
        "started_s": 100.0,
        "finished_s": 101.0,
        "engine_s": 0.5,
        "response_sent_s": 100.8,
    }
    return Generation(**(known | fields))
