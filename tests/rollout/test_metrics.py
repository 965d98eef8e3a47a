import pytest

from slime.engine.generation import parse
from slime.rollout.filters import mixed_rewards
from slime.rollout.metrics import busy_spans, example, rollout_metrics, union
from slime.types import Group, Sample
from tests.rollout.answers import answer


def sample(reward: float | None, length: int = 2, source: str = "a", finish: str = "stop", **metrics: float) -> Sample:
    ids = [1] * length
    error = None if reward is not None else "broken"
    return Sample("p", [1], 0, source=source, response_ids=ids, reward=reward, reward_error=error, metrics=metrics, finish_reason=finish)


def test_metrics_of_a_rollout():
    groups = [
        Group(0, [sample(1.0, 2, steps=3.0), sample(0.0, 4, finish="length")]),
        Group(1, [sample(1.0, 6, "b"), sample(1.0, 8, "b")]),
    ]
    judged = [s for g in groups for s in g.samples] + [sample(None)]
    got = rollout_metrics(groups, judged, [answer([1] * 5), answer([1] * 15, cached_tokens=8)], elapsed_s=2.0, cpu_s=0.001)
    assert got == pytest.approx(
        {
            "reward/mean": 0.75,
            "reward/std": 0.4330127,
            "reward/error_frac": 0.2,
            "reward/a/mean": 0.5,
            "reward/b/mean": 1.0,
            "reward/steps": 3.0,
            "group/zero_std_frac": 0.5,
            "response_len/mean": 5.0,
            "response_len/max": 8.0,
            "response_len/truncated_frac": 0.25,
            "engine/cache_hit": 0.6,
            "engine/running": 0.5,
            "engine/tokens_per_s": 10.0,
            "rollout/cpu_us_per_token": 50.0,
            "time/rollout_s": 2.0,
        }
    )


def test_rewards_are_shown_as_judged_and_penalties_beside_them():
    groups = [Group(0, [sample(1.0), sample(1.0)])]
    assert "reward/overlong_penalty" not in rollout_metrics(groups, [], [answer([1])], 1.0, 0.0)
    groups[0].samples[0].penalty, groups[0].samples[1].penalty = 0.0, -0.5
    got = rollout_metrics(groups, [], [answer([1])], 1.0, 0.0)
    assert (got["reward/mean"], got["reward/overlong_penalty"], got["group/zero_std_frac"]) == (1.0, -0.25, 0.0)
    assert example(groups[0].samples[1])["reward"] == 1.0


def test_a_reward_s_extra_does_not_pass_for_a_metric_of_ours():
    got = rollout_metrics([Group(0, [sample(1.0, mean=9.0)])], [], [answer([1])], 1.0, 0.0)
    assert got["reward/mean"] == 1.0


def test_waiting_in_an_engine_s_queue_is_not_work():
    """Where the engine tells it apart."""
    meta: dict = {
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.5, 7, None]],
        "weight_version": "r/0/0",
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "e2e_latency": 3.0,
        "response_sent_to_client_ts": 10.0,
    }
    parsed = [
        parse({"output_ids": [7], "text": "", "meta_info": meta | told}, False, "engine 0", 6.0, 11.0) for told in ({}, {"queue_time": 2.0})
    ]
    assert [busy_spans([g], [])[0].start_s for g in parsed] == [7.0, 9.0]
    running = [rollout_metrics([Group(0, [sample(1.0)])], [], [g], 2.0, 0.0)["engine/running"] for g in parsed]
    assert running == [1.5, 0.5]


def test_engines_are_busy_by_their_own_account():
    spans = busy_spans(
        [
            answer([1], engine="engine 0", response_sent_s=10.0, engine_s=2.0),
            answer([1], engine="engine 0", response_sent_s=11.0, engine_s=2.5),
            answer([1], engine="engine 0", response_sent_s=20.0, engine_s=1.0),
            answer([1], engine="engine 1", response_sent_s=5.0, engine_s=1.0),
        ],
        [(12.0, 12.5)],
    )
    assert sorted((s.process, s.name, s.start_s, s.end_s) for s in spans) == [
        ("engine 0", "engine", 8.0, 11.0),
        ("engine 0", "engine", 19.0, 20.0),
        ("engine 1", "engine", 4.0, 5.0),
        ("rollout", "reward", 12.0, 12.5),
    ]


def test_union():
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]
    assert union([]) == []


def test_an_example_shows_messages_as_text():
    s = sample(1.0)
    s.prompt, s.label = [{"role": "user", "content": "hi"}], ["a", "b"]
    assert example(s) == {"prompt": "[user] hi", "response": "", "reward": 1.0, "label": "['a', 'b']", "source": "a"}


def test_mixed_rewards():
    assert mixed_rewards(Group(0, [sample(1.0), sample(0.0)]))
    assert not mixed_rewards(Group(0, [sample(1.0), sample(1.0)]))
