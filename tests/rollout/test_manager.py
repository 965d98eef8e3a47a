"""The RolloutManager against a server that misbehaves: what is dropped, what is refused, and what the errors say."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.config import DataFile, EvalSet, SlimeConfig
from slime.config.algorithm import TeacherConfig
from slime.config.exits import GateStopped
from slime.engine import health
from slime.engine.errors import Aborted, EngineError, EngineLost, Garbage, StaleWeights
from slime.engine.health import Kind, Trouble, Turn
from slime.rollout.manager import RolloutManager
from slime.types import Batch, EvalResult, RolloutSummary
from tests.rollout import generate_functions
from tests.rollout.double import LABEL, Double
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.e2e
FUNCTIONS = "tests.rollout.generate_functions:"


@pytest.fixture
def cfg(tmp_path: Path) -> SlimeConfig:
    make_tokenizer(tmp_path / "model", 80)
    rows = [{"prompt": f"{i}+{i}=" + "0" * 50 * (i == 5), "label": "yes"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = SlimeConfig()
    cfg.run.dir, cfg.model.path = str(tmp_path), str(tmp_path / "model")
    cfg.data.train = [DataFile(str(tmp_path / "train.jsonl"))]
    cfg.data.shuffle, cfg.data.max_prompt_tokens = False, 20
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = 4, 2
    cfg.rollout.request_timeout_s, cfg.reward.workers = 1.0, 1
    return cfg


@asynccontextmanager
async def serving(cfg: SlimeConfig, behave: Callable[[dict[str, Any]], str]) -> AsyncIterator[tuple[RolloutManager, Double]]:
    """A manager connected to a double."""
    double = Double(behave)
    async with double.serving() as endpoint:
        manager = RolloutManager(cfg, cfg.run.dir)
        await manager.open()
        await manager.connect([endpoint], 80)
        try:
            await manager.expect(LABEL)
            yield manager, double
        finally:
            await manager.engines.close()
            for judge in (manager.judge, *manager.eval_judges.values()):
                await judge.close()


def rollout(cfg: SlimeConfig, behave: Callable[[dict[str, Any]], str], first: int = 0) -> tuple[Batch, RolloutSummary, Double]:
    """One rollout against a double; `ray.put` is left out."""

    async def run() -> tuple[Batch, RolloutSummary, Double]:
        async with serving(cfg, behave) as (manager, double):
            batch, summary, _ = await asyncio.wait_for(manager.generate(0, first), 60)
        return batch, summary, double  # type: ignore[return-value]

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.rollout.manager.ray.put", lambda value: value)


def prompt_of(body: dict[str, Any]) -> int:
    """The number that the prompt `n+n=` of a request begins with."""
    from tests.tiny import CHARACTERS, SPECIAL

    text = "".join(CHARACTERS[i - len(SPECIAL)] for i in body["input_ids"])
    return int(text.partition("+")[0])


def test_a_whole_rollout(cfg: SlimeConfig):
    batch, summary, _ = rollout(cfg, lambda body: "yes" if prompt_of(body) % 2 else "no")
    assert (summary.drawn, summary.trained, summary.dropped) == (4, [0, 1, 2, 3], {})
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch.rewards.tolist() == [0, 0, 1, 1] * 2
    assert summary.metrics["group/zero_std_frac"] == 1.0
    assert batch.version.tolist() == [0] * 8


def test_what_is_dropped_is_replaced_by_the_next_prompts_and_named(cfg: SlimeConfig):
    """Prompt 5 is too long, odd ones are filtered; the order in which groups finish changes nothing."""
    cfg.rollout.filter = FUNCTIONS + "odd_ordinals_go"
    _, summary, _ = rollout(cfg, lambda body: "yes", first=2)
    assert summary.trained == [2, 4, 6, 8]
    assert summary.dropped == {3: "filter", 5: "too_long", 7: "filter"}
    assert (summary.first_ordinal, summary.drawn) == (2, 7)


def test_dynamic_sampling_draws_on_until_enough_groups_have_mixed_rewards(cfg: SlimeConfig):
    """DAPO, section 3.2: of a third of the prompts the answers are equal; those are dropped by name, and the next prompts take their place.
    That equal answers differ in what their length costs keeps no group: a filter sees rewards as judged (eq. 11)."""
    cfg.rollout.filter, cfg.data.max_prompt_tokens = "slime.rollout.filters:mixed_rewards", 100
    cfg.rollout.max_response_tokens, cfg.reward.overlong_buffer = 4, 2
    asked: dict[int, int] = {}

    def behave(body: dict[str, Any]) -> str:
        prompt = prompt_of(body)
        asked[prompt] = asked.get(prompt, 0) + 1
        return "yes" if prompt % 3 == 0 or asked[prompt] == 1 else "no"

    batch, summary, _ = rollout(cfg, behave, first=3)
    assert summary.trained == [4, 5, 7, 8] and summary.dropped == {3: "filter", 6: "filter"} and summary.drawn == 6
    assert summary.metrics["group/zero_std_frac"] == 0.0 and len(batch) == 8
    assert summary.metrics["reward/mean"] == 0.5 and summary.metrics["reward/overlong_penalty"] == -0.5
    assert sorted(set(batch.rewards)) == [-0.5, 0.5] and {example["reward"] for example in summary.examples} <= {0.0, 1.0}


def test_answers_that_were_cut_off_are_not_trained_on(cfg: SlimeConfig):
    """One of prompt 1; of prompt 2 all, and another prompt takes its place."""
    cfg.rollout.mask_truncated = True
    asked: list[int] = []

    def behave(body: dict[str, Any]) -> str:
        asked.append(prompt_of(body))
        return "long" if asked[-1] == 2 or (asked[-1] == 1 and asked.count(1) == 1) else "yes"

    batch, summary, _ = rollout(cfg, behave)
    assert (summary.trained, summary.dropped) == ([0, 1, 3, 4], {2: "truncated"})
    assert sorted(batch.trained_lengths[2:4]) == [0, 3] and batch.trained_lengths.sum() == 3 * 7
    assert batch.rewards.tolist().count(0.0) == 1 and summary.metrics["response_len/truncated_frac"] == 1 / 8


def test_a_group_whose_reward_failed_is_replaced(cfg: SlimeConfig):
    cfg.reward.fn, cfg.reward.max_error_frac = "tests.rollout.reward_functions:behave", 0.5
    batch, summary, _ = rollout(cfg, lambda body: "raise" if prompt_of(body) == 1 else "1")
    assert (summary.trained, summary.dropped) == ([0, 2, 3, 4], {1: "reward_error"})
    assert summary.metrics["reward/error_frac"] == pytest.approx(0.2)
    assert batch.rewards.tolist() == [1.0] * 8


def test_too_many_failed_rewards_stop_the_run(cfg: SlimeConfig):
    cfg.reward.fn = "tests.rollout.reward_functions:behave"
    with pytest.raises(
        GateStopped, match=r"rewards failed .*above reward\.max_error_frac=0\.05; the first: the reward function raised KeyError"
    ):
        rollout(cfg, lambda body: "raise")
    judged = [json.loads(line) for line in (Path(cfg.run.dir) / "stopped" / "step_0000000_rewards.jsonl").read_text().splitlines()]
    assert judged and "KeyError" in judged[0]["reward_error"]


def test_arrival_takes_the_first_finished_and_drops_the_rest_by_name(cfg: SlimeConfig):
    cfg.rollout.select, cfg.rollout.request_timeout_s = "arrival", 60.0
    _, summary, double = rollout(cfg, lambda body: "hang" if prompt_of(body) == 0 else "yes")
    assert (summary.trained, summary.dropped, summary.drawn) == ([1, 2, 3, 4], {0: "surplus"}, 5)
    late = {body["rid"] for body in double.asked if prompt_of(body) == 0}
    assert len(late) == 2 and set(double.aborted) == late, "an engine goes on with answers that nobody waits for"


OVERLAPS = [("sync", "sampled", "all"), ("sync", "topk", "all")]
DOES_NOT = [("sync", "full", "all"), ("one_step_off", "sampled", "all"), ("sync", "sampled", "rollout")]


@pytest.mark.parametrize(("mode", "distill", "only"), [*OVERLAPS, *DOES_NOT])
def test_finished_groups_are_handed_over_where_ranks_that_wait_have_teachers(cfg: SlimeConfig, mode: str, distill: str, only: str):
    cfg.rollout.mode, cfg.run.only, cfg.algorithm.distill = mode, only, distill
    cfg.algorithm.teachers, cfg.rollout.generate = {"t": TeacherConfig("held")}, FUNCTIONS + "the_fourth_waits"
    generate_functions.RELEASED = asyncio.Event()
    first: list[Batch] = []

    async def run() -> tuple[Batch, list[Batch]]:
        async with serving(cfg, lambda body: "yes") as (manager, _):
            under_way = asyncio.create_task(manager.generate(0, 0))
            while (progress := await manager.progress("rollout")).done < 3:
                first.extend(progress.finished)  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
            first.extend(progress.finished)  # type: ignore[arg-type]
            generate_functions.RELEASED.set()
            batch, _, _ = await asyncio.wait_for(under_way, 60)
            assert (await manager.progress("evaluation")).finished == []
            last = (await manager.progress("rollout")).finished
            assert (await manager.progress("rollout")).finished == []
        return batch, last  # type: ignore[return-value]

    batch, last = asyncio.run(run())
    if (mode, distill, only) in DOES_NOT:
        assert first == [] and last == []
        return
    assert sorted(int(group.group[0]) for group in first) == [0, 1, 2] and [int(group.group[0]) for group in last] == [3]
    handed = Batch.concatenate(sorted([*first, *last], key=lambda group: int(group.group[0])))
    assert handed.columns().keys() == batch.columns().keys()
    for name, column in handed.columns().items():
        np.testing.assert_array_equal(column, getattr(batch, name))


def test_several_samples_of_one_trajectory(cfg: SlimeConfig):
    cfg.rollout.generate = FUNCTIONS + "twice"
    batch, _, _ = rollout(cfg, lambda body: "yes")
    assert len(batch) == 16 and batch.group.tolist() == sorted([0, 1, 2, 3] * 4)


def test_seeds_belong_to_the_sample(cfg: SlimeConfig):
    cfg.run.deterministic = True

    def seeds(first: int) -> dict[int, list[int]]:
        _, _, double = rollout(cfg, lambda body: "yes", first)
        found: dict[int, list[int]] = {}
        for body in double.asked:
            found.setdefault(prompt_of(body), []).append(body["sampling_params"]["sampling_seed"])
        return {prompt: sorted(seeds) for prompt, seeds in found.items()}

    early, late = seeds(0), seeds(1)
    assert all(early[p] == late[p] for p in (1, 2, 3))
    every = [s for seeds in early.values() for s in seeds]
    assert len(set(every)) == len(every) == 8 and all(0 <= s < 2**31 for s in every)


FAILURES = [
    ("stale", StaleWeights, Kind.STALE, "engine 0 answered with weights run/0/9, expected run/0/0"),
    ("die", EngineLost, Kind.LOST, "engine 0 at http://127.* was lost while it generated"),
    ("hang", TimeoutError, Kind.LATE, r"engine 0 gave no answer after 1 s \(rollout.request_timeout_s\)"),
    ("abort", Aborted, None, "engine 0 aborted a request after 3 tokens"),
    ("nan", Garbage, Kind.GARBAGE, "engine 0 returned the log-prob NaN for token 1 of 3, which no probability has"),
    ("error", Garbage, Kind.GARBAGE, "engine 0 refused a request: 500 .*an assertion"),
    ("cut", Garbage, Kind.GARBAGE, "engine 0 answered .* which is no JSON"),
    ("odd", Garbage, Kind.GARBAGE, "engine 0 returned what is no answer: KeyError: 'meta_info'"),
    ("alien", Garbage, Kind.GARBAGE, r"engine 0 returned token ids from 5 to 999, outside the model's vocabulary \[0, 80\)"),
]


async def tend(manager: RolloutManager, found: list[Trouble]) -> None:
    """A driver and a host agent that bring back whatever is reported."""
    lives = 0
    while True:
        if troubles := (await manager.progress("rollout")).troubles:
            found += troubles
            lives += 1
            await manager.tell([Turn(trouble.engine, health.State.HEALTHY, "it is back", lives) for trouble in troubles])
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(("what", "kind", "reported", "says"), FAILURES, ids=[failure[0] for failure in FAILURES])
def test_an_engine_that_fails(what: str, kind: type[Exception], reported: Kind | None, says: str, cfg: SlimeConfig):
    """A request is asked again, under another id, and fails with all reasons when it has failed three times; before, it is answered."""

    def run(times: int) -> tuple[RolloutSummary, Double, list[Trouble]]:
        count, troubles = iter(range(100)), []

        async def with_failures() -> tuple[RolloutSummary, Double]:
            async with serving(cfg, lambda body: what if prompt_of(body) == 3 and next(count) < times else "yes") as (manager, double):
                tending = asyncio.create_task(tend(manager, troubles))
                try:
                    return (await asyncio.wait_for(manager.generate(0, 0), 60))[1], double
                finally:
                    tending.cancel()

        return *asyncio.run(with_failures()), troubles

    cfg.rollout.samples_per_prompt = 1
    summary, double, troubles = run(2)
    asked = [body for body in double.asked if prompt_of(body) == 3]
    assert summary.trained == [0, 1, 2, 3] and len(asked) == 3 and len({body["rid"] for body in asked}) == 3
    assert {trouble.kind for trouble in troubles} == ({reported} if reported else set())
    with pytest.raises(kind, match=rf"a request failed 3 times: {says}"):
        run(100)


def test_a_request_that_an_engine_refuses_is_not_asked_again(cfg: SlimeConfig):
    with pytest.raises(EngineError, match=r"engine 0 refused a request: 400 .*no such parameter"):
        rollout(cfg, lambda body: "refuse" if prompt_of(body) == 3 else "yes")


def test_requests_wait_for_an_engine_only_so_long(cfg: SlimeConfig):
    cfg.rollout.start_timeout_s, cfg.sync.timeout_s = 0.3, 0.2
    with pytest.raises(
        EngineLost, match=r"no engine can answer after 0.5 s \(rollout.start_timeout_s \+ sync.timeout_s\): engine 0 is dead"
    ):
        rollout(cfg, lambda body: "die" if prompt_of(body) == 3 else "yes")


def test_requests_of_an_engine_that_fails_go_to_the_others(cfg: SlimeConfig):
    """It gets no more of them, and the same seeds are asked for."""
    cfg.run.deterministic, first, second = True, Double(lambda body: "cut"), Double(lambda body: "yes", "engine 1")

    async def run() -> tuple[RolloutSummary, list[Trouble]]:
        async with first.serving() as one, second.serving() as other:
            manager = RolloutManager(cfg, cfg.run.dir)
            await manager.open()
            await manager.connect([one, other], 80)
            await manager.expect(LABEL)
            _, summary, _ = await asyncio.wait_for(manager.generate(0, 0), 60)
            troubles = (await manager.progress("rollout")).troubles
            await manager.engines.close()
            await manager.judge.close()
        return summary, troubles

    summary, troubles = asyncio.run(run())
    assert summary.trained == [0, 1, 2, 3] and 0 < len(first.asked) < 8
    assert [(t.engine, t.kind, t.life) for t in troubles] == [("engine 0", Kind.GARBAGE, 0)]

    def seeds(double: Double) -> set[int]:
        return {body["sampling_params"]["sampling_seed"] for body in double.asked}

    assert seeds(first) < seeds(second) and len(seeds(second)) == 8


def test_what_is_asked_of_an_engine_that_its_agent_gives_up_is_asked_of_others(cfg: SlimeConfig):
    """It hangs, and its connections do not break."""
    cfg.rollout.request_timeout_s = 50.0
    first, second = Double(lambda body: "hang"), Double(lambda body: "yes", "engine 1")

    async def run() -> RolloutSummary:
        async with first.serving() as one, second.serving() as other:
            manager = RolloutManager(cfg, cfg.run.dir)
            await manager.open()
            await manager.connect([one, other], 80)
            await manager.expect(LABEL)
            generating = asyncio.create_task(manager.generate(0, 0))
            while not first.asked:
                await asyncio.sleep(0.02)
            await manager.tell([Turn("engine 0", health.State.DEAD, "no answer for 60 s", 0)])
            _, summary, _ = await asyncio.wait_for(generating, 10)
            await manager.engines.close()
            await manager.judge.close()
        return summary

    assert asyncio.run(run()).trained == [0, 1, 2, 3] and len(second.asked) == 8


@pytest.mark.parametrize(
    ("knob", "function", "kind", "says"),
    [
        ("generate", "raises", RuntimeError, r"rollout\.generate=\S+:raises failed on sample \d of prompt \d: KeyError: 'tool'"),
        ("generate", "returns_text", ValueError, r"rollout\.generate=\S+ returned str; return a Sample or a list of them"),
        ("generate", "returns_nothing", ValueError, r"rollout\.generate=\S+ returned no sample for prompt"),
        ("generate", "forgets_the_mask", ValueError, r"rollout\.generate: .* has 3 response ids but 2 entries in loss_mask"),
        ("generate", "knows_no_probability", ValueError, r"rollout\.generate: .* has nan in rollout_logprobs at token 1 of 3"),
        (
            "generate",
            "means_another_group",
            ValueError,
            r"rollout\.generate=\S+ returned a sample of group 0 for prompt \d; .*dataclasses\.replace",
        ),
        (
            "generate",
            "goes_on_and_on",
            ValueError,
            r"returned 1027 response tokens for prompt \d, above rollout\.max_response_tokens=1024; stop",
        ),
        ("generate", "trains_nothing", ValueError, r"returned a sample without tokens to train on for prompt \d; append_answer"),
        ("filter", "perhaps", ValueError, r"rollout\.filter=\S+:perhaps returned str; return True to keep a group"),
        ("filter", "broken", RuntimeError, r"rollout\.filter=\S+:broken failed on prompt \d: ZeroDivisionError: division by zero"),
        ("filter", "nobody_stays", GateStopped, r"prompts were dropped \(filter.*\) and 0 of 4 kept, .*; loosen rollout\.filter"),
    ],
)
def test_a_function_of_the_user_that_fails(cfg: SlimeConfig, knob: str, function: str, kind: type[Exception], says: str):
    setattr(cfg.rollout, knob, FUNCTIONS + function)
    with pytest.raises(kind, match=says):
        rollout(cfg, lambda body: "yes")


def evaluate(cfg: SlimeConfig, text: str) -> tuple[list[EvalResult], Double]:
    """One evaluation of answers that are `text`, twice in a row."""

    async def run() -> tuple[list[EvalResult], Double]:
        async with serving(cfg, lambda body: text) as (manager, double):
            await manager.evaluate(0)
            results, _ = await manager.evaluate(1)
        return results, double

    return asyncio.run(run())


def test_an_evaluation_whose_rewards_fail_stops_the_run(cfg: SlimeConfig):
    cfg.data.eval = {"e": EvalSet(cfg.data.train[0].path, limit=4, reward="tests.rollout.reward_functions:behave")}
    with pytest.raises(GateStopped, match="returned None"):
        evaluate(cfg, "none")


def test_an_evaluation_set_s_own_knobs_are_named(cfg: SlimeConfig):
    cfg.data.eval = {"e": EvalSet(cfg.data.train[0].path, limit=1, max_response_tokens=9)}
    cfg.rollout.generate = FUNCTIONS + "goes_on_and_on"
    with pytest.raises(ValueError, match=r"returned 12 response tokens for prompt 0, above data\.eval\.e\.max_response_tokens=9; stop"):
        evaluate(cfg, "yes")
    cfg.data.eval["e"].reward = "tests.rollout.reward_functions:behav"
    with pytest.raises(ValueError, match=r"^data\.eval\.e\.reward=tests\.rollout\.reward_functions:behav: .*did you mean behave"):
        evaluate(cfg, "yes")


def test_seeds_belong_to_the_evaluation_set_too(cfg: SlimeConfig):
    cfg.run.deterministic = True
    cfg.data.eval = {name: EvalSet(cfg.data.train[0].path, limit=3, temperature=1.0) for name in ("a", "b")}
    results, double = evaluate(cfg, "yes")
    seeds = [body["sampling_params"]["sampling_seed"] for body in double.asked]
    assert len(seeds) == 2 * 2 * 3 and len(set(seeds)) == 2 * 3, "each set draws its own, the same in every evaluation"
    assert [r.metrics["response_len/mean"] for r in results] == [3.0, 3.0]
    assert results[0].metrics.keys() >= {"accuracy", "response_len/max", "response_len/truncated_frac", "reward_error_frac"}


def test_samples_of_one_prompt_share_nothing(cfg: SlimeConfig):
    """A generate function may write to what it is given, in an evaluation too, whose prompts are kept from one to the next."""
    path = Path(cfg.data.train[0].path)
    row = {"prompt": [{"role": "user", "content": "1+1="}], "label": "yes", "metadata": {"tags": []}}
    path.write_text((json.dumps(row) + "\n") * 4)
    cfg.data.eval = {"e": EvalSet(str(path), samples=2)}
    cfg.rollout.generate = FUNCTIONS + "keeps_notes"
    assert len(rollout(cfg, lambda body: "yes")[0]) == 8
    assert evaluate(cfg, "yes")[0][0].metrics["accuracy"] == 1.0
