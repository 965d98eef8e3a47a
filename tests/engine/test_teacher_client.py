"""What a teacher says of tokens: of a real server against transformers, and of one that misbehaves what is made of that."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime.engine import teacher_client
from slime.engine.endpoint import Endpoint
from slime.engine.errors import Aborted, EngineError, EngineLost, Garbage
from slime.engine.ports import free_ports
from slime.engine.server import Server
from slime.engine.teacher_client import TeacherClient, Vocabulary, parse_signal
from slime.types import TeacherSignal
from tests.engine import servers
from tests.engine.teacher_double import TeacherDouble
from tests.engine.test_server import tensors
from tests.tiny import load_hf_model

PROMPT, ANSWER = [5, 6, 7], [8, 9, 10, 1]
SAME = Vocabulary(80, 80)


def client(*endpoints: Endpoint, vocabulary: Vocabulary = SAME, timeout_s: float = 60.0, wait_s: float = 5.0) -> TeacherClient:
    return TeacherClient(endpoints, vocabulary, timeout_s=timeout_s, wait_s=wait_s, max_in_flight=8)


# --- a real server ------------------------------------------------------------------------------------------------------


def reference(model: Path, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """float64 [R, V]: log-probs of all tokens at each of the answer's positions."""
    with torch.no_grad():
        logits = load_hf_model(model)(torch.tensor([[*prompt, *answer]])).logits[0]
    return logits.double().log_softmax(-1)[len(prompt) - 1 : -1].numpy()


@pytest.mark.e2e
def test_what_a_real_server_says_is_what_its_model_thinks(server: Server, models: tuple[Path, Path]) -> None:
    """Alone and among others, the bits are the same: the server is in deterministic mode. One token and one prompt token are enough."""
    servers.update(server, tensors(models[1]), "run/teacher")
    cases = [([5], [8]), (PROMPT, ANSWER), (list(range(5, 60)), list(range(79, 9, -1))), (list(range(5, 60)), [70])]

    async def ask() -> tuple[list[TeacherSignal], list[TeacherSignal]]:
        teacher = client(server.spec.endpoint)
        together = await asyncio.gather(*(teacher.read([*prompt, *answer], len(prompt), 6) for prompt, answer in cases))
        alone = [await teacher.read([*prompt, *answer], len(prompt), 6) for prompt, answer in cases]
        await teacher.close()
        return together, alone

    together, alone = asyncio.run(ask())
    for (prompt, answer), said, again in zip(cases, together, alone, strict=True):
        expected = reference(models[1], prompt, answer)
        assert said.top_ids is not None and said.top_logprobs is not None
        assert (said.logprobs.dtype, said.top_ids.dtype, said.top_logprobs.dtype) == (np.float32, np.int32, np.float32)
        np.testing.assert_allclose(said.logprobs, expected[np.arange(len(answer)), answer], atol=1e-4)
        np.testing.assert_allclose(said.top_logprobs, -np.sort(-expected, 1)[:, :6], atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(expected, said.top_ids, 1), said.top_logprobs, atol=1e-4)
        assert again.top_logprobs is not None
        assert said.logprobs.tobytes() == again.logprobs.tobytes() and said.top_logprobs.tobytes() == again.top_logprobs.tobytes()


@pytest.mark.e2e
def test_how_a_real_server_reads_tokens_and_how_many(server: Server) -> None:
    async def ask() -> tuple[list[str], int]:
        teacher = client(server.spec.endpoint)
        found = await teacher.texts(server.spec.endpoint, [5, 3, 6]), await teacher.longest(server.spec.endpoint)
        await teacher.close()
        return found

    texts, longest = asyncio.run(ask())
    assert texts == ["0", "<user>", "1"]

    async def read(count: int) -> TeacherSignal:
        teacher = client(server.spec.endpoint)
        try:
            return await teacher.read([7] * count, 3)
        finally:
            await teacher.close()

    assert len(asyncio.run(read(longest)).logprobs) == longest - 3
    with pytest.raises(EngineError, match=r"^engine 0 at http://\S+: engine 0 refused a request: 400 "):
        asyncio.run(read(longest + 1))


# --- a server that misbehaves -------------------------------------------------------------------------------------------


def read(
    behave: Callable[[dict[str, Any]], str], top_k: int = 2, vocabulary: Vocabulary = SAME, timeout_s: float = 10.0
) -> tuple[TeacherSignal, TeacherDouble]:
    double = TeacherDouble(behave)

    async def run() -> TeacherSignal:
        async with double.serving() as endpoint:
            teacher = client(endpoint, vocabulary=vocabulary, timeout_s=timeout_s)
            try:
                return await teacher.read([*PROMPT, *ANSWER], len(PROMPT), top_k)
            finally:
                await teacher.close()

    return asyncio.run(run()), double


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_client, "PAUSE_S", 0.02)


def test_what_is_asked_and_where_the_answer_lies() -> None:
    said, double = read(lambda body: "well")
    assert said.top_ids is not None and said.top_logprobs is not None
    np.testing.assert_array_equal(said.logprobs, np.float32([-0.8, -0.9, -1.0, -0.1]))
    assert said.top_ids.tolist() == [[0, 1]] * 4 and said.top_logprobs.tolist() == [[-1.0, -2.0]] * 4
    (body,) = double.asked
    assert (body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]) == ([*PROMPT, *ANSWER], 2, 2)
    assert body["sampling_params"]["max_new_tokens"] == 0 and body["return_logprob"] is True
    said, double = read(lambda body: "well", top_k=0)
    assert said.top_ids is None and "top_logprobs_num" not in double.asked[0]


def test_likeliest_tokens_that_the_student_does_not_have_are_left_out() -> None:
    """Their probability is in the tail. A few more are asked for, so that enough are left."""
    ids = [7, *ANSWER]
    vocabulary = Vocabulary(90, 80)
    row = [[-1.0 - i, number, None] for i, number in enumerate([81, 3, 85, 89, 4, 5, 6, 7, 9, 10])]
    answer = {
        "meta_info": {
            "finish_reason": {"type": "length"},
            "input_token_logprobs": [[None, 7, None], *([-0.5, i, None] for i in ANSWER)],
            "input_top_logprobs": [None, *[row] * 4],
        }
    }
    said = parse_signal(answer, "teacher", ids, 2, vocabulary)
    assert said.top_ids is not None and said.top_logprobs is not None
    assert said.top_ids.tolist() == [[3, 4]] * 4 and said.top_logprobs.tolist() == [[-2.0, -5.0]] * 4
    assert (vocabulary.asked(2), Vocabulary(82, 80).asked(2), Vocabulary(80, 90).asked(2), SAME.asked(80)) == (10, 4, 2, 80)
    for entry, number in zip(row, [*range(80, 89), 5], strict=True):
        entry[1] = number
    with pytest.raises(Garbage, match="that the student does not have"):
        parse_signal(answer, "teacher", ids, 2, vocabulary)
    with pytest.raises(ValueError, match=r"algorithm\.distill_top_k=81: the teacher has 80 tokens; lower it"):
        SAME.asked(81)


FAILURES = [
    ("die", EngineLost, "teacher math at http://127.* was lost while it generated"),
    ("hang", TimeoutError, r"teacher math gave no answer after 0.2 s \(rollout.request_timeout_s\)"),
    ("error", Garbage, "teacher math refused a request: 500"),
    ("busy", EngineLost, "teacher math refused a request: 503"),
    ("cut", Garbage, "teacher math answered .* which is no JSON"),
    ("odd", Garbage, "teacher math returned what is no answer: KeyError: 'meta_info'"),
    ("abort", Aborted, "teacher math aborted a request"),
    ("nan", Garbage, "teacher math returned the log-prob NaN, which no probability has"),
    ("positive", Garbage, "teacher math returned the log-prob 0.5, which no probability has"),
    ("others", Garbage, "teacher math was asked about 5 tokens and returned the log-probs of 5 others"),
    ("short", Garbage, "teacher math was asked about 5 tokens and returned the log-probs of 4 others"),
    ("few", Garbage, "teacher math returned the likeliest tokens of 4 positions, not 2 at each of 4"),
    ("same", Garbage, "teacher math returned likeliest tokens from 0 to 1, not 2 different ones of 80 at each position"),
    ("alien", Garbage, "teacher math returned likeliest tokens from 1 to 99, not 2 different ones of 80 at each position"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("what", "kind", "says"), FAILURES, ids=[failure[0] for failure in FAILURES])
def test_a_teacher_that_fails(what: str, kind: type[Exception], says: str) -> None:
    """It is asked again under another id, and ends the run with all reasons when it has failed three times."""
    turns = iter([what, what])
    timeout_s = 0.2 if what == "hang" else 10.0
    said, double = read(lambda body: next(turns, "well"), timeout_s=timeout_s)
    assert said.logprobs[0] == np.float32(-0.8) and len({body["rid"] for body in double.asked}) == len(double.asked) == 3
    with pytest.raises(kind, match=rf"^teacher math at http://127\S+: a request failed 3 times: {says}"):
        read(lambda body: what, timeout_s=timeout_s)


def test_a_refusal_is_final() -> None:
    asked: list[dict[str, Any]] = []
    with pytest.raises(EngineError, match=r"^teacher math at http://127\S+: teacher math refused a request: 400 .*too long for me"):
        read(lambda body: asked.append(body) or "refuse")
    assert len(asked) == 1


def test_ids_that_the_teacher_does_not_have_are_not_asked_about() -> None:
    """They would end old servers."""
    double = TeacherDouble()
    with pytest.raises(ValueError, match=r"token id 10 is outside the model's vocabulary \[0, 10\)"):
        read(double.behave, vocabulary=Vocabulary(10, 80))


def test_a_server_that_starts_anew_is_waited_for() -> None:
    async def run(wait_s: float) -> TeacherSignal:
        double = TeacherDouble()
        (port,) = free_ports("127.0.0.1", 1)
        teacher = client(Endpoint(f"http://127.0.0.1:{port}", "", "teacher math"), wait_s=wait_s)
        reading = asyncio.create_task(teacher.read([*PROMPT, *ANSWER], len(PROMPT)))
        try:
            await asyncio.sleep(0.3)
            async with double.serving(port):
                return await reading
        finally:
            await teacher.close()

    assert len(asyncio.run(run(5.0)).logprobs) == 4
    with pytest.raises(EngineLost, match=r"teacher math does not accept connections at \S+ .*; it did not come back in 0.2 s"):
        asyncio.run(run(0.2))


def test_sessions_stay_with_a_server_and_leave_one_that_fails() -> None:
    first, second = TeacherDouble(lambda body: "error", "teacher math 0"), TeacherDouble(name="teacher math 1")

    async def run() -> None:
        async with first.serving() as one, second.serving() as other:
            teacher = client(one, other)
            await asyncio.gather(*(teacher.read([*PROMPT, *ANSWER], len(PROMPT), session=session) for session in (2, 4, 5, 7)))
            await teacher.close()

    asyncio.run(run())
    assert (len(first.asked), len(second.asked)) == (2, 4)
