"""Metrics of a rollout, from its groups. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from slime.observe.trace import Span
from slime.rollout.client import Generation
from slime.types import Group, Messages, Sample


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample was shown to a teacher. Seconds since 1970."""

    teacher: str
    start_s: float
    end_s: float


def rollout_metrics(
    groups: Sequence[Group], judged: Sequence[Sample], generations: Sequence[Generation], elapsed_s: float, cpu_s: float
) -> dict[str, float]:
    """reward/*, group/*, response_len/*, engine/*, rollout/*, time/rollout_s. `cpu_s` is what this process spent.

    `groups` make the batch; `judged` are all samples that were given to the reward function, `generations` all answers of the engines.
    engine/running is the mean number of requests that the engines had at work, with those in their queues where they do not tell them apart
    (see `busy_spans`).
    """
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([r for g in groups for r in g.rewards])
    by_source: dict[str, list[float]] = defaultdict(list)
    extras: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        assert s.reward is not None
        by_source[s.source].append(s.reward)
        for name, value in s.metrics.items():
            extras[name].append(value)
    penalties = [s.penalty for s in samples if s.penalty is not None]
    prompt_tokens = sum(g.prompt_tokens for g in generations)
    tokens = sum(len(g.output_ids) for g in generations)
    return {
        **{f"reward/{name}": float(np.mean(v)) for name, v in extras.items()},
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/error_frac": error_frac(judged),
        "group/zero_std_frac": float(np.mean([np.std(g.trained_rewards) == 0 for g in groups])),
        **response_lengths(samples),
        "engine/cache_hit": sum(g.cached_tokens for g in generations) / max(1, prompt_tokens),
        "engine/running": sum(g.engine_s for g in generations) / elapsed_s,
        "engine/tokens_per_s": tokens / elapsed_s,
        "rollout/cpu_us_per_token": 1e6 * cpu_s / max(1, tokens),
        "time/rollout_s": elapsed_s,
        **({"reward/overlong_penalty": float(np.mean(penalties))} if penalties else {}),
        **({f"reward/{name}/mean": float(np.mean(v)) for name, v in by_source.items()} if len(by_source) > 1 else {}),
    }


def teacher_metrics(asked: Sequence[Asked]) -> dict[str, float]:
    """rollout/teacher_s: how long a sample waited for its teacher's answer, on average; {} where none is served."""
    return {"rollout/teacher_s": float(np.mean([a.end_s - a.start_s for a in asked]))} if asked else {}


def response_lengths(samples: Sequence[Sample]) -> dict[str, float]:
    """response_len/{mean,max,truncated_frac}, of whole responses; {} where there are none."""
    if not samples:
        return {}
    lengths = np.array([len(s.response_ids) for s in samples])
    return {
        "response_len/mean": float(lengths.mean()),
        "response_len/max": float(lengths.max()),
        "response_len/truncated_frac": float(np.mean([s.truncated for s in samples])),
    }


def error_frac(samples: Sequence[Sample]) -> float:
    """Share of judged samples that got no reward."""
    return sum(s.reward_error is not None for s in samples) / max(1, len(samples))


def busy_spans(generations: Iterable[Generation], judging: Iterable[tuple[float, float]], asked: Iterable[Asked] = ()) -> list[Span]:
    """When each engine had at least one of these requests at work, when anything was judged, and when each teacher was asked anything.

    By the engine's own account: a request counts from when the engine took it up until it sent the answer. An engine that does not tell
    when that was (see engine.generation.parse) is taken to have begun when the request arrived. So a span is decoding, prefill, SGLang's
    own overhead and, there, waiting: for room, which others take up by decoding, or for a paused engine, which no rollout in
    rollout.mode=sync or one_step_off meets. Of a retracted request the length is right, and the wait is taken from its beginning.
    """
    by_engine: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for g in generations:
        by_engine[g.engine].append((g.response_sent_s - g.engine_s, g.response_sent_s))
    engines = [Span("engine", engine, begin, end) for engine, intervals in by_engine.items() for begin, end in union(intervals)]
    by_teacher: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for a in asked:
        by_teacher[f"teacher {a.teacher}"].append((a.start_s, a.end_s))
    teachers = [Span("teacher", name, begin, end) for name, intervals in by_teacher.items() for begin, end in union(intervals)]
    return [*engines, *teachers, *(Span("reward", "rollout", begin, end) for begin, end in union(judging))]


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The intervals that these cover, ascending and apart."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def examples(groups: Sequence[Group], count: int) -> list[dict]:
    """A few samples for the report, one a group: prompt, response, reward, label, source."""
    return [example(g.samples[0]) for g in groups[:count]]


def example(sample: Sample) -> dict:
    return {
        "prompt": readable(sample.prompt),
        "response": sample.text,
        "reward": sample.reward,
        "label": sample.label if isinstance(sample.label, str | int | float | None) else str(sample.label),
        "source": sample.source,
    }


def readable(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"[{m['role']}] {m.get('content')}" for m in prompt)
