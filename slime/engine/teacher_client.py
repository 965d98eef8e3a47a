"""The asynchronous client of a teacher that SGLang serves: token ids in, the teacher's log-probs of them out.

A request generates nothing. SGLang's input_token_logprobs[i] speaks about input token logprob_start_len + i given all before it; of the
first it says null, so the last token before those that are asked about is asked about too:

    ids                      [ 7  1  8  2 10  0 ]      begin=4: what is said of 10 and 0
    logprob_start_len        3
    input_token_logprobs     [[null, 2], [-.2, 10], [-.01, 0]]
    input_top_logprobs       [null, [[-.2, 10], [-1.9, 6]], [[-.01, 0], [-5., 3]]]      with top_logprobs_num=2

A teacher has one set of weights for ever, whatever it calls them. SGLang ignores the temperature for tokens that are given. It calls the
last token of its vocabulary 0 where it names input tokens (as if it were the placeholder of an image); the log-prob is that of the token.
"""

import asyncio
import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import Aborted, EngineError, EngineLost, Garbage
from slime.engine.generation import check_ids
from slime.engine.posting import Refused, lasting_session, post_generate
from slime.types import TeacherSignal, bad_logprob

ATTEMPTS = 3  # answers that may fail before a request does
PAUSE_S = 1.0  # before it is asked again
SPARE = 8  # further tokens that are asked for where some of the teacher's may not be the student's
NOTHING = {"max_new_tokens": 0, "temperature": 1.0}  # how nothing is drawn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the embeddings. Ids below both mean the same to both."""

    teacher: int
    student: int

    def asked(self, top_k: int) -> int:
        """Tokens to ask for, so that `top_k` are left that the student has. Raises ValueError where the teacher has fewer."""
        asked = top_k + min(SPARE, max(0, self.teacher - self.student))
        if asked > self.teacher:
            raise ValueError(f"algorithm.distill_top_k={top_k}: the teacher has {self.teacher} tokens; lower it")
        return asked


class TeacherClient:
    """One teacher, on servers that all hold it. Make it where an event loop runs.

    A request whose answer is late, lost, garbage or cut short is asked again, of the next server where there are several. Servers that
    accept no connection have `wait_s` to come back: they may be starting anew.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], vocabulary: Vocabulary, *, timeout_s: float, wait_s: float, max_in_flight: int
    ) -> None:
        """`timeout_s` for one answer; `max_in_flight` requests under way, further ones wait here."""
        assert endpoints, "a teacher needs a server"
        self.endpoints = list(endpoints)
        self.vocabulary = vocabulary
        self._timeout_s, self._wait_s = timeout_s, wait_s
        self._slots = asyncio.Semaphore(max_in_flight)
        self._session = lasting_session()

    async def read(self, ids: Sequence[int], begin: int, top_k: int = 0, session: int = 0) -> TeacherSignal:
        """What the teacher says of `ids[begin:]`, each given all before it; with `top_k`, of its likeliest tokens there too. Requests of
        one `session` go to one server, whose cache holds what they have in common.

        Raises ValueError for ids that the teacher does not have, EngineError for a refusal, and what the last of three answers that
        failed came to, naming the server: TimeoutError naming rollout.request_timeout_s, EngineLost, Garbage, Aborted.
        """
        assert 0 < begin < len(ids), f"nothing to read after {begin} of {len(ids)} tokens"
        check_ids(ids, self.vocabulary.teacher)
        body = self._body(ids, begin - 1)
        if top_k:
            body["top_logprobs_num"] = self.vocabulary.asked(top_k)
        return await self._asked(body, session, lambda answer, name: parse_signal(answer, name, ids[begin - 1 :], top_k, self.vocabulary))

    # --- at the start -----------------------------------------------------------------------------------------------

    async def longest(self, endpoint: Endpoint) -> int:
        """Tokens of the longest input that a server takes. Raises what `Control.info` raises."""
        info = await Control(endpoint, self._session).info()
        longest = info.get("max_req_input_len")
        if not isinstance(longest, int):
            raise Garbage(f"{endpoint.name} at {endpoint.url} does not say how long its input may be (max_req_input_len in /server_info)")
        return longest - 1

    async def texts(self, endpoint: Endpoint, ids: Sequence[int]) -> list[str]:
        """Each id alone as a server reads it; the last of its vocabulary it reads as the first. Raises what `read` raises, of one
        attempt."""
        check_ids(ids, self.vocabulary.teacher)
        answer = await self._once(endpoint, self._body(ids, 0) | {"return_text_in_logprobs": True})
        try:
            return [str(text) for _, _, text in answer["meta_info"]["input_token_logprobs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise Garbage(f"{endpoint.name} at {endpoint.url} returned what is no answer: {type(error).__name__}: {error}") from error

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _asked(self, body: dict[str, Any], session: int, parse: Callable[[dict[str, Any], str], T]) -> T:
        failed: list[str] = []
        waited_since: float | None = None
        async with self._slots:
            for turn in itertools.count(session):
                endpoint = self.endpoints[turn % len(self.endpoints)]
                try:
                    return parse(await self._once(endpoint, body), endpoint.name)
                except Refused as error:
                    now = asyncio.get_running_loop().time()
                    waited_since = now if waited_since is None else waited_since
                    if now - waited_since > self._wait_s:
                        raise EngineLost(f"{error}; it did not come back in {self._wait_s:g} s (rollout.start_timeout_s)") from error
                except (Garbage, Aborted, EngineLost, TimeoutError) as error:
                    failed.append(str(error))
                    if len(failed) == ATTEMPTS:
                        said = f"{endpoint.name} at {endpoint.url}: a request failed {ATTEMPTS} times: {'; '.join(failed)}"
                        raise type(error)(said) from error
                except EngineError as error:
                    raise EngineError(f"{endpoint.name} at {endpoint.url}: {error}") from error
                await asyncio.sleep(PAUSE_S)
        raise AssertionError("the loop ends by an answer or an error")

    def _body(self, ids: Sequence[int], begin: int) -> dict[str, Any]:
        return {"input_ids": list(ids), "sampling_params": NOTHING, "return_logprob": True, "logprob_start_len": begin}

    async def _once(self, endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
        """Of a request that is given up SGLang hears by its connection, which ends."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await post_generate(self._session, endpoint, body | {"rid": uuid.uuid4().hex})
        except TimeoutError as error:
            raise TimeoutError(f"{endpoint.name} gave no answer after {self._timeout_s:g} s (rollout.request_timeout_s)") from error

    async def close(self) -> None:
        await self._session.close()


def parse_signal(answer: dict[str, Any], name: str, ids: Sequence[int], top_k: int, vocabulary: Vocabulary) -> TeacherSignal:
    """What SGLang's answer says of `ids[1:]`; see the module.

    Raises Garbage where it speaks of other tokens, of another number of them, or holds a value that no log-prob can have; Aborted for one
    that was cut short.
    """
    try:
        return _parsed(answer, name, list(ids), top_k, vocabulary)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Garbage(f"{name} returned what is no answer: {type(error).__name__}: {error}") from error


def _parsed(answer: dict[str, Any], name: str, ids: list[int], top_k: int, vocabulary: Vocabulary) -> TeacherSignal:
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise Aborted(f"{name} aborted a request; its log says why")
    said = meta["input_token_logprobs"]
    last = vocabulary.teacher - 1
    named = [number if entry == 0 and number == last else entry for entry, number in zip((e[1] for e in said), ids, strict=False)]
    if len(said) != len(ids) or named != ids:
        raise Garbage(f"{name} was asked about {len(ids)} tokens and returned the log-probs of {len(said)} others")
    logprobs = [entry[0] for entry in said[1:]]
    _check_values(name, logprobs)
    signal = TeacherSignal(np.array(logprobs, np.float32))
    if top_k:
        signal.top_ids, signal.top_logprobs = _likeliest(meta["input_top_logprobs"][1:], name, len(ids) - 1, top_k, vocabulary)
    return signal


def _likeliest(rows: list[Any], name: str, count: int, top_k: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(int32 ids, float32 log-probs) [count, top_k] of the likeliest tokens that the student has too."""
    asked = vocabulary.asked(top_k)
    if len(rows) != count or any(len(row) != asked for row in rows):
        raise Garbage(f"{name} returned the likeliest tokens of {len(rows)} positions, not {asked} at each of {count}")
    ids = np.array([[entry[1] for entry in row] for row in rows], np.int64)
    flat = [entry[0] for row in rows for entry in row]
    _check_values(name, flat)
    if not 0 <= ids.min() <= ids.max() < vocabulary.teacher or (np.diff(np.sort(ids, 1), axis=1) == 0).any():
        where = f"not {asked} different ones of {vocabulary.teacher} at each position"
        raise Garbage(f"{name} returned likeliest tokens from {ids.min()} to {ids.max()}, {where}")
    known = ids < vocabulary.student
    if (known.sum(1) < top_k).any():
        raise Garbage(f"{name} holds tokens for the likeliest that the student does not have, {SPARE} and more at one position")
    chosen = np.argsort(~known, 1, kind="stable")[:, :top_k]  # known ones first, in the order in which they came
    logprobs = np.array(flat, np.float32).reshape(ids.shape)
    return np.take_along_axis(ids, chosen, 1).astype(np.int32), np.take_along_axis(logprobs, chosen, 1)


def _check_values(name: str, logprobs: list[float | None]) -> None:
    at = bad_logprob(logprobs)
    if at is not None:
        value = "NaN" if logprobs[at] is None else logprobs[at]
        raise Garbage(f"{name} returned the log-prob {value}, which no probability has: its logits overflowed or its weights are broken")
