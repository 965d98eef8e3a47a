"""Served teachers in a rollout: who is asked about what and when, and what is found out before anything is generated."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from slime.config import DataFile, EvalSet, SlimeConfig
from slime.config.algorithm import TeacherConfig
from slime.config.exits import PreflightError
from slime.data.template import load_tokenizer
from slime.engine import teacher_client
from slime.engine.endpoint import Endpoint
from slime.engine.errors import Garbage
from slime.observe.trace import Span
from slime.rollout.manager import RolloutManager
from slime.rollout.teachers import Teachers, spread
from slime.types import Batch, RolloutSummary
from tests.engine.teacher_double import TeacherDouble
from tests.rollout.double import LABEL, Double
from tests.tiny import CHARACTERS, SPECIAL, make_tokenizer

pytestmark = pytest.mark.e2e
MATH, CODE, HELD = range(3)  # positions in algorithm.teachers
SOURCES = ["algebra", "python", "chat", "geometry"]


@pytest.fixture
def cfg(tmp_path: Path) -> SlimeConfig:
    """Two served teachers and one on the actor's ranks; a source each, and one more for the first."""
    make_tokenizer(tmp_path / "model", 80)
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 80}')
    rows = [{"prompt": f"{i}+{i}=", "label": "yes", "source": SOURCES[i % 4]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = SlimeConfig()
    cfg.run.dir, cfg.model.path = str(tmp_path), str(tmp_path / "model")
    cfg.data.train, cfg.data.shuffle = [DataFile(str(tmp_path / "train.jsonl"))], False
    cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens = 20, 30
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = 4, 2
    cfg.rollout.request_timeout_s, cfg.reward.workers = 1.0, 1
    cfg.algorithm.distill, cfg.algorithm.distill_top_k = "topk", 3
    cfg.algorithm.teachers = {
        "math": TeacherConfig(cfg.model.path, url="http://math", sources=["algebra", "geometry"]),
        "code": TeacherConfig(cfg.model.path, url="http://code", sources=["python"]),
        "held": TeacherConfig(cfg.model.path, sources=["chat"]),
    }
    return cfg


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.rollout.manager.ray.put", lambda value: value)
    monkeypatch.setattr(teacher_client, "PAUSE_S", 0.05)


def rollout(cfg: SlimeConfig, doubles: dict[str, TeacherDouble], evaluate: bool = False) -> tuple[Batch, RolloutSummary, list[Span]]:
    """One rollout, and an evaluation before it."""

    async def run() -> tuple[Batch, RolloutSummary, list[Span]]:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(Double(lambda body: "yes").serving())
            teachers = {name: [await stack.enter_async_context(double.serving())] for name, double in doubles.items()}
            manager = RolloutManager(cfg, cfg.run.dir)
            await manager.open()
            await manager.connect([engine], 80, teachers=teachers)
            try:
                await manager.expect(LABEL)
                if evaluate:
                    await manager.evaluate(0)
                return await asyncio.wait_for(manager.generate(0, 0), 60)  # type: ignore[return-value]
            finally:
                for one in (manager.engines, manager.teachers, manager.judge):
                    await one.close()

    return asyncio.run(run())


def two() -> dict[str, TeacherDouble]:
    return {"math": TeacherDouble(), "code": TeacherDouble(name="teacher code")}


def test_each_sample_is_shown_to_the_teacher_of_its_source(cfg: SlimeConfig) -> None:
    """Prompts are 0+0= 1+1= 2+2= 3+3=, every answer is 5 6 1, and of token t the double thinks -t / 10."""
    doubles = two()
    batch, summary, spans = rollout(cfg, doubles)
    assert batch.teacher is not None and batch.teacher.tolist() == [MATH] * 2 + [CODE] * 2 + [HELD] * 2 + [MATH] * 2
    assert {name: len(double.asked) for name, double in doubles.items()} == {"math": 4, "code": 2}
    assert {tuple(body["input_ids"][-3:]) for body in doubles["math"].asked} == {(5, 6, 1)}
    assert {body["logprob_start_len"] for body in doubles["math"].asked} == {3}
    assert batch.teacher_logprobs is not None and batch.teacher_ids is not None and batch.teacher_top is not None
    served = batch.loss_mask & (batch.teacher != HELD)[batch.sample_of_token]
    np.testing.assert_array_equal(batch.teacher_logprobs, np.where(served, -batch.tokens / 10, 0).astype(np.float32))
    assert batch.teacher_ids[served].tolist() == [[0, 1, 2]] * 18 and batch.teacher_top[served].tolist() == [[-1.0, -2.0, -3.0]] * 18
    assert summary.metrics["rollout/teacher_s"] > 0
    assert {(s.process, s.name) for s in spans} >= {("teacher math", "teacher"), ("teacher code", "teacher"), ("engine 0", "engine")}


def test_only_what_goes_on_to_the_batch_is_shown_and_nothing_of_an_evaluation(cfg: SlimeConfig) -> None:
    cfg.rollout.filter, cfg.rollout.dump = "tests.rollout.generate_functions:odd_ordinals_go", True
    cfg.data.eval = {"e": EvalSet(cfg.data.train[0].path, limit=4)}
    doubles = two()
    batch, summary, _ = rollout(cfg, doubles, evaluate=True)
    assert summary.trained == [0, 2, 4, 6]
    assert batch.teacher is not None and batch.teacher.tolist() == [MATH, MATH, HELD, HELD] * 2
    assert {name: len(double.asked) for name, double in doubles.items()} == {"math": 4, "code": 0}
    samples = [json.loads(line) for line in (Path(cfg.run.dir) / "rollouts" / "step_0000000.jsonl").read_text().splitlines()[1:]]
    assert [s["teacher"] for s in samples] == batch.teacher.tolist() and "signal" not in samples[0], "the columns hold it"


def test_teachers_on_the_actor_s_ranks_alone_are_only_named(cfg: SlimeConfig) -> None:
    del cfg.algorithm.teachers["math"], cfg.algorithm.teachers["code"]
    cfg.algorithm.teachers["held"].sources = []
    batch, summary, _ = rollout(cfg, {})
    assert batch.teacher is not None and batch.teacher.tolist() == [0] * 8 and batch.teacher_logprobs is None and batch.teacher_ids is None
    assert "rollout/teacher_s" not in summary.metrics


def test_without_distillation_nobody_teaches(cfg: SlimeConfig) -> None:
    cfg.algorithm.teachers, cfg.algorithm.distill = {}, "none"
    batch, _, _ = rollout(cfg, {})
    assert batch.teacher is None


def test_no_sample_stays_untaught(cfg: SlimeConfig) -> None:
    broken = {"math": TeacherDouble(lambda body: "nan"), "code": TeacherDouble()}
    with pytest.raises(Garbage, match=r"^teacher math at http://127\S+: a request failed 3 times: teacher math returned the log-prob NaN"):
        rollout(cfg, broken)
    cfg.algorithm.teachers["code"].sources = ["rust"]
    with pytest.raises(ValueError, match=r"^source python has no teacher \(math: algebra, geometry; code: rust; held: chat\): add it to "):
        rollout(cfg, two())


# --- before anything is generated ---------------------------------------------------------------------------------------


def character(number: int) -> str:
    return [*SPECIAL, *CHARACTERS][number]


def check(cfg: SlimeConfig, double: TeacherDouble, prompt_ids: Sequence[int] = (10, 11)) -> None:
    async def run() -> None:
        async with double.serving() as endpoint:
            teachers = Teachers(cfg, 80, {"math": [endpoint]})
            try:
                await teachers.check(load_tokenizer(cfg.model), prompt_ids)
            finally:
                await teachers.close()

    asyncio.run(run())


def test_a_server_that_reads_tokens_as_the_student_does(cfg: SlimeConfig) -> None:
    """Each token once; the last one SGLang reads as the first."""
    double = TeacherDouble(texts=character, longest=51)
    check(cfg, double)
    (body,) = double.asked
    assert body["input_ids"][:2] == [10, 11] and sorted(body["input_ids"]) == list(range(64)) and body["return_text_in_logprobs"] is True
    assert (spread(80, 64)[-1], spread(640, 64)[:3], spread(3, 64)) == (63, [0, 10, 20], [0, 1, 2])


UNFIT: dict[str, tuple[TeacherDouble, type[Exception], str]] = {
    "another vocabulary": (
        TeacherDouble(texts=lambda number: character((number + 1) % 80)),
        ValueError,
        r"it does not read the student's tokens as the student does: 10 is '5' to the student and '6' to the teacher; .* more; serve",
    ),
    "no tokenizer": (TeacherDouble(texts=lambda number: ""), ValueError, r": 10 is '5' to the student and '' to the teacher"),
    "too short": (
        TeacherDouble(texts=character, longest=50),
        ValueError,
        r"teacher math takes 49 tokens at most, and samples have up to 50 \(data.max_prompt_tokens \+ rollout.max_response_tokens\)",
    ),
    "of another kind": (TeacherDouble(longest=None), PreflightError, r"teacher math at \S+ does not say how long its input may be"),
    "it fails": (
        TeacherDouble(lambda body: "error"),
        PreflightError,
        r"teacher math refused a request: 500 .*; start the server, or correct ",
    ),
}


@pytest.mark.parametrize(("double", "kind", "says"), UNFIT.values(), ids=UNFIT)
def test_a_server_that_is_unfit(cfg: SlimeConfig, double: TeacherDouble, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=rf"^algorithm\.teachers\.math\.url=http://math: .*{says}"):
        check(cfg, double)


def test_a_server_that_does_not_answer(cfg: SlimeConfig) -> None:
    async def run() -> None:
        teachers = Teachers(cfg, 80, {"math": [Endpoint("http://127.0.0.1:9", "", "teacher math")]})
        try:
            await teachers.check(load_tokenizer(cfg.model), [10])
        finally:
            await teachers.close()

    with pytest.raises(
        PreflightError, match=r"^algorithm\.teachers\.math\.url=http://math: teacher math at http://127.0.0.1:9 was lost during"
    ):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"vocab_size": "many"}', r"config\.json has the vocab_size 'many'; give a whole number"),
        ("{}", r"config\.json does not say the vocab_size"),
        ('{"text_config": {"vocab_size": 2}}', r"algorithm\.distill_top_k=3: the teacher has 2 tokens; lower it"),
    ],
)
def test_a_teacher_s_vocabulary_is_known(cfg: SlimeConfig, config: str, says: str) -> None:
    (Path(cfg.model.path) / "config.json").write_text(config)

    async def make() -> None:
        Teachers(cfg, 80, {"math": [Endpoint("http://127.0.0.1:9", "")]})

    with pytest.raises(ValueError, match=says):
        asyncio.run(make())
