"""A request to an engine and its answer, as records and as SGLang's JSON."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime.engine.errors import EngineError, Garbage
from slime.models.map import Routing
from slime.types import VersionSpan, bad_logprob


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end the answer, beside the tokenizer's end tokens
    seed: int | None = None  # of deterministic mode; other engines ignore it

    def to_sglang(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        if self.stop:
            chosen["stop"] = list(self.stop)
        if self.seed is not None:
            chosen["sampling_seed"] = self.seed
        return chosen


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to P prompt tokens. R response tokens; times in seconds since 1970."""

    output_ids: list[int]  # [R], with the end token where there is one
    logprobs: list[float]  # [R], natural log, of the drawn tokens under softmax(logits / temperature); top-p does not change them
    text: str
    finish_reason: str  # stop | length | abort
    versions: list[VersionSpan]  # cover [0, R)
    prompt_tokens: int
    cached_tokens: int  # of the prompt, taken from the engine's cache
    engine: str  # who answered
    started_s: float  # the request was sent
    finished_s: float  # the answer had arrived
    engine_s: float  # what the engine says it took, see `parse`
    response_sent_s: float  # when the engine says it sent the answer; of a streamed one it does not say, and this is finished_s
    experts: np.ndarray | None = None  # int16 [P + R - 1, layers, chosen], where asked for: the last token went nowhere
    scores: list[float] | None = None  # where asked for: log-probs of prompt tokens, each given all before it, at temperature 1

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.started_s


def check_ids(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for a prompt that an engine must not see: an id outside the vocabulary ends its process."""
    if not prompt_ids:
        raise ValueError("an empty prompt: give at least one token id")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary [0, {vocab_size}): does the tokenizer belong to the model?")


def parse(
    answer: dict[str, Any],
    has_spans: bool,
    engine: str,
    started_s: float,
    finished_s: float,
    routing: Routing | None = None,
    scored: int = 0,
) -> Generation:
    """SGLang's answer of /generate with return_logprob; with return_routed_experts where `routing` is given, and with logprob_start_len
    where the last `scored` tokens of the prompt are asked about.

    `engine_s` is the time from the request's arrival to the answer, less what it waited in SGLang's queue, which SGLang tells only with
    rollout.sglang.enable_metrics=true (`queue_time`); without it the wait counts as work.

    Raises Garbage where fields are missing, ids and log-probs do not belong together, for a value that no log-prob can have, and for
    experts that are not those of the model; EngineError where experts are missing.
    """
    try:
        return _parsed(answer, has_spans, engine, started_s, finished_s, routing, scored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Garbage(f"{engine} returned what is no answer: {type(error).__name__}: {error}") from error


def _parsed(
    answer: dict[str, Any], has_spans: bool, engine: str, started_s: float, finished_s: float, routing: Routing | None, scored: int
) -> Generation:
    meta, ids = answer["meta_info"], answer["output_ids"]
    triples = meta["output_token_logprobs"]
    if [t[1] for t in triples] != ids:
        raise Garbage(f"{engine} returned {len(ids)} token ids and log-probs of {len(triples)} others")
    logprobs = _checked([t[0] for t in triples], engine)
    scores = None
    if scored:
        scores = _checked([t[0] for t in meta["input_token_logprobs"][1:]], engine)  # of the first SGLang says null
        if len(scores) != scored:
            raise Garbage(f"{engine} was asked about {scored} tokens and returned the log-probs of {len(scores)}")
    spans = meta["weight_versions"] if has_spans else [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
    return Generation(
        output_ids=ids,
        logprobs=logprobs,
        text=answer["text"],
        finish_reason=meta["finish_reason"]["type"],
        versions=[VersionSpan(s["version"], s["start"], s["end"]) for s in spans],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        engine=engine,
        started_s=started_s,
        finished_s=finished_s,
        engine_s=max(0.0, meta["e2e_latency"] - meta.get("queue_time", 0.0)),
        response_sent_s=meta.get("response_sent_to_client_ts", finished_s),
        experts=_experts(meta, len(ids), routing, engine) if routing and meta["finish_reason"]["type"] != "abort" else None,
        scores=scores,
    )


def _checked(logprobs: list[float], engine: str) -> list[float]:
    at = bad_logprob(logprobs)
    if at is not None:
        value = "NaN" if logprobs[at] is None else logprobs[at]
        raise Garbage(
            f"{engine} returned the log-prob {value} for token {at} of {len(logprobs)}, which no probability has: its logits overflowed or "
            f"its weights are broken; try model.dtype=fp32, or another attention_backend under rollout.sglang"
        )
    return logprobs


def check_answer(answer: Generation, vocab_size: int, longest: int) -> None:
    """Raises Garbage for tokens that the model does not have, and for more of them than were asked for."""
    ids = answer.output_ids
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise Garbage(f"{answer.engine} returned token ids from {min(ids)} to {max(ids)}, outside the model's vocabulary [0, {vocab_size})")
    if len(ids) > longest:
        raise Garbage(f"{answer.engine} returned {len(ids)} tokens where at most {longest} were asked for")


def _experts(meta: dict[str, Any], answered: int, routing: Routing, engine: str) -> np.ndarray:
    """int16 [P + R - 1, layers, chosen] from the base64 of int32."""
    encoded = meta.get("routed_experts")
    if not encoded:
        raise EngineError(
            f"{engine} returned no routed_experts: start it with --enable-return-routed-experts, or set rollout.replay_experts=false"
        )
    try:
        values = np.frombuffer(base64.b64decode(encoded, validate=True), np.int32)
    except (binascii.Error, ValueError) as error:
        raise Garbage(f"{engine} returned routed_experts that are not base64 of int32 values ({error})") from error
    tokens = meta["prompt_tokens"] + answered - 1
    if values.size != tokens * routing.layers * routing.chosen or (values.size and not 0 <= values.min() <= values.max() < routing.experts):
        raise Garbage(
            f"{engine} returned {values.size} routed_experts for {tokens} tokens, not {routing.layers} layers x {routing.chosen} of "
            f"{routing.experts} experts each: does it serve another model?"
        )
    return values.astype(np.int16).reshape(tokens, routing.layers, routing.chosen)
