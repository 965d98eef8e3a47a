"""SGLang's answer as a record, without a server."""

import math
from typing import Any

import pytest

from slime.engine.errors import EngineError
from slime.engine.generation import Generation, parse
from slime.types import LOGPROB_SLACK


def parsed(logprobs: list[Any], ids: list[int] | None = None, **meta: Any) -> Generation:
    ids = ids or [5, 6, 1]
    known = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)],
        "weight_versions": [{"version": "r/0/0", "start": 0, "end": len(ids)}],
        "prompt_tokens": 4,
        "cached_tokens": 0,
        "e2e_latency": 2.0,
        "response_sent_to_client_ts": 100.0,
    }
    return parse({"output_ids": [5, 6, 1], "text": "ab", "meta_info": known | meta}, True, "engine 3", 97.0, 101.0)


@pytest.mark.parametrize(("value", "shown"), [(None, "NaN"), (math.nan, "nan"), (-math.inf, "-inf"), (2 * LOGPROB_SLACK, "0.002")])
def test_what_is_no_log_prob_is_the_engine_s_error(value: float | None, shown: str) -> None:
    """JSON has no NaN: SGLang writes null."""
    with pytest.raises(
        EngineError, match=f"engine 3 returned the log-prob {shown} for token 2 of 3, which no probability has: .*model.dtype"
    ):
        parsed([-0.1, -0.2, value])


def test_rounding_may_lift_a_log_prob_above_0() -> None:
    assert parsed([0.0, LOGPROB_SLACK / 2, -0.3]).logprobs == [0.0, LOGPROB_SLACK / 2, -0.3]


def test_ids_and_log_probs_belong_together() -> None:
    with pytest.raises(EngineError, match="engine 3 returned 3 token ids and log-probs of 3 others"):
        parsed([-0.1, -0.2, -0.3], ids=[5, 7, 1])


def test_time_in_the_queue_is_left_out_where_it_is_told() -> None:
    assert parsed([-0.1] * 3).engine_s == 2.0
    assert parsed([-0.1] * 3, queue_time=1.5).engine_s == 0.5
    assert parsed([-0.1] * 3, queue_time=2.5).engine_s == 0.0
