"""SGLang's answer as a record, without a server."""

import base64
import math
from typing import Any

import numpy as np
import pytest

from slime.engine.errors import EngineError
from slime.engine.generation import Generation, parse
from slime.models.map import Routing
from slime.types import LOGPROB_SLACK

ROUTING = Routing(layers=3, chosen=2, experts=8)


def parsed(logprobs: list[Any], ids: list[int] | None = None, routing: Routing | None = None, scored: int = 0, **meta: Any) -> Generation:
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
    return parse({"output_ids": [5, 6, 1], "text": "ab", "meta_info": known | meta}, True, "engine 3", 97.0, 101.0, routing, scored)


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


def test_scores_of_the_last_tokens_of_the_prompt() -> None:
    """Of the one before them SGLang says nothing."""
    said = [[None, 3, None], [-0.5, 4, None], [-0.25, 5, None]]
    assert parsed([-0.1] * 3).scores is None
    assert parsed([-0.1] * 3, scored=2, input_token_logprobs=said).scores == [-0.5, -0.25]
    with pytest.raises(EngineError, match="engine 3 was asked about 3 tokens and returned the log-probs of 2"):
        parsed([-0.1] * 3, scored=3, input_token_logprobs=said)
    with pytest.raises(EngineError, match="engine 3 returned the log-prob NaN for token 0 of 1"):
        parsed([-0.1] * 3, scored=1, input_token_logprobs=[said[1], said[0]])
    with pytest.raises(EngineError, match="engine 3 returned what is no answer: KeyError"):
        parsed([-0.1] * 3, scored=1)


def test_time_in_the_queue_is_left_out_where_it_is_told() -> None:
    assert parsed([-0.1] * 3).engine_s == 2.0
    assert parsed([-0.1] * 3, queue_time=1.5).engine_s == 0.5
    assert parsed([-0.1] * 3, queue_time=2.5).engine_s == 0.0


def encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.int32).tobytes()).decode()


def test_experts_of_every_token_but_the_last() -> None:
    experts = np.random.default_rng(0).integers(0, 8, (4 + 3 - 1, 3, 2))
    found = parsed([-0.1] * 3, routing=ROUTING, routed_experts=encoded(experts)).experts
    assert found is not None and found.dtype == np.int16
    np.testing.assert_array_equal(found, experts)
    assert parsed([-0.1] * 3).experts is None
    assert parsed([-0.1] * 3, routing=ROUTING, finish_reason={"type": "abort"}).experts is None  # the abort is what matters


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "engine 3 returned no routed_experts: start it with --enable-return-routed-experts, or set rollout.replay_experts=false"),
        ("????", "engine 3 returned routed_experts that are not base64 of int32 values"),
        ("AAAA", "engine 3 returned routed_experts that are not base64 of int32 values"),
        (encoded(np.zeros((7, 3, 2))), "returned 42 routed_experts for 6 tokens, not 3 layers x 2 of 8 experts each: .*another model"),
        (encoded(np.full((6, 3, 2), 8)), "returned 36 routed_experts for 6 tokens, not 3 layers x 2 of 8 experts"),
        (encoded(np.full((6, 3, 2), -1)), "returned 36 routed_experts for 6 tokens"),
    ],
)
def test_experts_that_cannot_be_the_model_s(value: str | None, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parsed([-0.1] * 3, routing=ROUTING, routed_experts=value)
