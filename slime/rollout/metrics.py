"""Metrics of a rollout, from its groups. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from slime.observe.trace import Span
from slime.rollout.client import Generation
from slime.types import Group, Messages, Sample


def rollout_metrics(
    groups: Sequence[Group], judged: Sequence[Sample], generations: Sequence[Generation], elapsed_s: float, cpu_s: float
) -> dict[str, float]:
    """reward/*, group/*, response_len/*, engine/*, rollout/*, time/rollout_s. `cpu_s` is what this process spent.

    `groups` make the batch; `judged` are all samples that were given to the reward function, `generations` all answers of the engines.
    """
    samples = [s for g in groups for s in g.samples]
    rewards = np.array([r for g in groups for r in g.rewards])
    lengths = np.array([len(s.response_ids) for s in samples])
    by_source: dict[str, list[float]] = defaultdict(list)
    extras: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        assert s.reward is not None
        by_source[s.source].append(s.reward)
        for name, value in s.metrics.items():
            extras[name].append(value)
    prompt_tokens = sum(g.prompt_tokens for g in generations)
    tokens = sum(len(g.output_ids) for g in generations)
    return {
        **{f"reward/{name}": float(np.mean(v)) for name, v in extras.items()},
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/error_frac": error_frac(judged),
        "group/zero_std_frac": float(np.mean([np.std(g.rewards) == 0 for g in groups])),
        "response_len/mean": float(lengths.mean()),
        "response_len/max": float(lengths.max()),
        "response_len/truncated_frac": float(np.mean([s.truncated for s in samples])),
        "engine/cache_hit": sum(g.cached_tokens for g in generations) / max(1, prompt_tokens),
        "engine/running": sum(g.engine_s for g in generations) / elapsed_s,
        "engine/tokens_per_s": tokens / elapsed_s,
        "rollout/cpu_us_per_token": 1e6 * cpu_s / max(1, tokens),
        "time/rollout_s": elapsed_s,
        **({f"reward/{name}/mean": float(np.mean(v)) for name, v in by_source.items()} if len(by_source) > 1 else {}),
    }


def error_frac(samples: Sequence[Sample]) -> float:
    """Share of judged samples that got no reward."""
    return sum(s.reward_error is not None for s in samples) / max(1, len(samples))


def busy_spans(generations: Iterable[Generation], judging: Iterable[tuple[float, float]]) -> list[Span]:
    """When each engine worked on at least one of these requests, by its own account, and when anything was judged."""
    by_engine: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for g in generations:
        by_engine[g.engine].append((g.response_sent_s - g.engine_s, g.response_sent_s))
    engines = [Span("engine", engine, begin, end) for engine, intervals in by_engine.items() for begin, end in union(intervals)]
    return [*engines, *(Span("reward", "rollout", begin, end) for begin, end in union(judging))]


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
