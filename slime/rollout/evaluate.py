"""Evaluation of one set of prompts."""

import asyncio
from math import comb

import numpy as np

from slime.config import EvalSet, SlimeConfig
from slime.data.template import tokenize
from slime.rollout.groups import GroupMaker
from slime.rollout.metrics import error_frac, example
from slime.types import EvalResult, Group, Prompt

SUCCESS = 1.0  # a reward of at least this counts as solved in pass_at_k


async def evaluate_set(name: str, eval_set: EvalSet, prompts: list[Prompt], maker: GroupMaker, cfg: SlimeConfig) -> EvalResult:
    """Answer and judge every prompt of a set, `samples` times each.

    A prompt longer than data.max_prompt_tokens or a reward that fails counts as not solved, and is counted by name.
    """
    tokenized = [(p, tokenize(p, maker.client.tokenizer, cfg.data)) for p in prompts]
    asked = [(p, ids) for p, ids in tokenized if ids is not None]
    groups = await asyncio.gather(*(maker.make(p, ids, eval_set.samples) for p, ids in asked))
    metrics = scores([[s.reward or 0.0 for s in g.samples] for g in groups], len(prompts), eval_set.samples)
    lengths = [len(s.response_ids) for g in groups for s in g.samples]
    metrics["response_len"] = float(np.mean(lengths)) if lengths else 0.0
    metrics["reward_error_frac"] = error_frac(maker.judged)
    metrics["too_long_frac"] = 1 - len(asked) / len(prompts)
    return EvalResult(name, metrics, [example(g.samples[0]) for g in spread(groups, cfg.observe.examples)])


def scores(rewards: list[list[float]], prompts: int, samples: int) -> dict[str, float]:
    """accuracy: mean reward of each prompt's first answer. avg_at_k and pass_at_k over k = `samples` answers, where k > 1.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374); `prompts` that have no answer count as 0.
    """
    accuracy = sum(r[0] for r in rewards) / prompts
    if samples == 1:
        return {"accuracy": accuracy}
    return {
        "accuracy": accuracy,
        "avg_at_k": sum(float(np.mean(r)) for r in rewards) / prompts,
        "pass_at_k": sum(pass_at_k(len(r), sum(x >= SUCCESS for x in r), samples) for r in rewards) / prompts,
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n answers, c of them right, hold a right one."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def spread(groups: list[Group], count: int) -> list[Group]:
    """`count` groups, evenly over the set."""
    return groups[:: max(1, len(groups) // count)][:count] if count else []
