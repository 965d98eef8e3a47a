"""Reward workers as real processes, with functions that crash, hang, raise and lie."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web

from slime.config import RewardConfig
from slime.rollout.rewards.judge import Judge
from slime.types import Sample

pytestmark = pytest.mark.e2e
HERE = "tests.rollout.reward_functions:"


def sample(text: str, label: str | None = None, group: int = 0) -> Sample:
    return Sample("p", [1, 2], group, label=label, source="gsm8k", metadata={"index": 7}, response_ids=[3, 4], text=text)


def judged(texts: list[str], label: str | None = None, **cfg) -> list[Sample]:
    """The samples of one group with these texts, judged by a fresh Judge."""

    async def run() -> list[Sample]:
        judge = await Judge.open(RewardConfig(**cfg))
        samples = [sample(text, label) for text in texts]
        await asyncio.wait_for(judge.judge(samples), 30)
        await judge.close()
        return samples

    return asyncio.run(run())


ERRORS = {
    "crash": "the process of the reward function ended with exit code 3",
    "segfault": "the process of the reward function died of SIGSEGV",
    "exit": "the process of the reward function ended with exit code 5",
    "hang": "the reward function took longer than reward.timeout_s=1",
    "raise": "the reward function raised KeyError: 'no such thing' (",
    "nan": "the reward function returned nan, which is not finite",
    "text": "the reward function returned '1.0' (str), not a number",
    "none": "the reward function returned None (NoneType), not a number",
    "keyless": "the reward function returned a dict without score or reward; it has accuracy",
}


def test_a_bad_answer_costs_itself_and_no_other():
    mixed = [text for error in ERRORS for text in (error, "0.25")]
    got = judged(mixed, fn=HERE + "behave", workers=3, timeout_s=1.0)
    for text, s in zip(mixed, got, strict=True):
        if text in ERRORS:
            assert s.reward is None and s.reward_error is not None and s.reward_error.startswith(ERRORS[text]), text
        else:
            assert (s.reward, s.reward_error) == (0.25, None)


def test_numbers_of_a_dict_are_metrics():
    dict_, bool_ = judged(["dict", "bool"], fn=HERE + "behave", workers=1)
    assert (dict_.reward, dict_.metrics) == (0.5, {"steps": 3.0, "right": 1.0})
    assert bool_.reward == 1.0


def test_hundreds_of_asynchronous_judgements_run_at_once():
    begun = time.monotonic()
    got = judged(["sleep 0.5"] * 300, fn=HERE + "behave_async", workers=2)
    assert {s.reward for s in got} == {1.0}
    assert time.monotonic() - begun < 10  # 150 s one after another


def test_an_asynchronous_function_that_brings_down_its_worker_costs_itself_alone():
    texts = ["sleep 0.2"] * 4 + ["crash", "raise", "await", "hang", "own timeout"]
    got = judged(texts, fn=HERE + "behave_async", workers=1, timeout_s=1.0)
    assert [s.reward for s in got] == [1.0] * 4 + [None] * 5
    assert got[4].reward_error == ERRORS["crash"]
    assert got[6].reward_error == got[7].reward_error == ERRORS["hang"]
    assert (got[8].reward_error or "").startswith("the reward function raised TimeoutError: upstream")


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_processes_judge_as_the_recipe_says(workers: int):
    got = judged(["x"] * 9, fn=HERE + "names_its_process", workers=workers)
    assert len({s.reward for s in got}) == workers


def test_a_whole_group_at_once():
    got = judged(["a", "aaa", "aa"], fn=HERE + "longest_wins", signature="group")
    assert [(s.reward, s.metrics["length"]) for s in got] == [(0.0, 1.0), (1.0, 3.0), (0.0, 2.0)]
    got = judged(["a", "b"], fn=HERE + "one_too_few", signature="group")
    assert {s.reward_error for s in got} == {"the reward function of a group returned 1 values; it must return a list of 2, one a sample"}


def test_verl_s_signature():
    right, wrong = judged(["5", "6"], label="5", fn=HERE + "compute_score", signature="verl")
    assert (right.reward, wrong.reward, right.metrics) == (1.0, 0.0, {"acc": 1.0})


def test_slime_s_signature_reads_and_cannot_write():
    right, wrong = judged(["5", "6"], label="5", fn=HERE + "custom_rm", signature="slime")
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    (got,) = judged(["5"], fn=HERE + "writes_to_the_sample", signature="slime")
    assert "sample.reward is read-only: return the reward" in (got.reward_error or "")
    (got,) = judged(["5"], fn=HERE + "reads_what_is_not_there", signature="slime")
    assert "args.hf_checkpoint is not offered to a reward function; there are rm_type, rm_url" in (got.reward_error or "")


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        ("tests.rollout.reward_functions:behav", "did you mean behave"),
        ("tests.rollout.reward_function:behave", "no module tests.rollout.reward_function"),
        (HERE + "not_a_function", "is int, not a function"),
    ],
)
def test_a_function_that_cannot_be_loaded(fn: str, says: str):
    with pytest.raises(ValueError, match=rf"reward\.fn={fn}.*{says}"):
        judged([], fn=fn)


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (HERE + "behav", "did you mean behave"),
        ("tests.rollout.ends_its_process:judge", "the process that imports it ended with exit code 9"),
    ],
)
def test_an_evaluation_set_s_own_function_is_named_by_its_own_knob(fn: str, says: str):
    with pytest.raises(ValueError, match=rf"^data\.eval\.aime\.reward={fn}: .*{says}"):
        asyncio.run(Judge.open(RewardConfig(workers=1), fn, "data.eval.aime.reward"))


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path):
    """Also while a reward function hangs."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, time\n"
        "from slime.config import RewardConfig\n"
        "from slime.rollout.rewards.judge import Judge\n"
        "from slime.types import Sample\n"
        "async def main():\n"
        f"    judge = await Judge.open(RewardConfig(fn='{HERE}behave', workers=2))\n"
        "    print(*(w._process.pid for w in judge._backend._workers), flush=True)\n"
        "    await judge.judge([Sample('p', [1], 0, text='hang')] * 2)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    time.sleep(0.3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    give_up = time.monotonic() + 5
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < give_up, "a worker outlived its parent"
        time.sleep(0.05)


def test_what_a_crashed_reward_function_started_ends_with_it(tmp_path: Path):
    (got,) = judged([f"leave {tmp_path / 'pid'}"], fn=HERE + "behave", workers=1)
    assert got.reward_error == ERRORS["crash"]
    left = int((tmp_path / "pid").read_text())
    give_up = time.monotonic() + 5
    while alive(left):
        assert time.monotonic() < give_up, "a process outlived the reward function that started it"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_url_judges():
    async def answer(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        match asked["response"]:
            case "bad":
                return web.Response(status=500, text="out of order")
            case "late":
                await asyncio.sleep(1)
            case "html":
                return web.Response(text="<html>")
            case "dict":
                return web.json_response({"reward": 0.5, "tokens": 12})
        return web.json_response(float(asked["response"] == asked["label"] and asked["metadata"] == {"index": 7}))

    async def run() -> list[Sample]:
        app = web.Application()
        app.router.add_post("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        judge = await Judge.open(RewardConfig(url=f"http://127.0.0.1:{port}/", timeout_s=0.5))
        samples = [sample(text, "5") for text in ("5", "6", "dict", "bad", "late", "html")]
        await judge.judge(samples)
        await judge.close()
        await runner.cleanup()
        gone = await Judge.open(RewardConfig(url=f"http://127.0.0.1:{port}/", timeout_s=0.5))
        samples.append(sample("5", "5"))
        await gone.judge(samples[-1:])
        await gone.close()
        return samples

    right, wrong, dict_, bad, late, html, gone = asyncio.run(run())
    assert (right.reward, wrong.reward, dict_.reward, dict_.metrics) == (1.0, 0.0, 0.5, {"tokens": 12.0})
    for failed, says in ((bad, "answered 500: out of order"), (late, "took longer than"), (html, "failed: "), (gone, "failed: ")):
        assert failed.reward is None and says in (failed.reward_error or "")
