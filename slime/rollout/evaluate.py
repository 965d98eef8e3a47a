"""Evaluation of one set of prompts."""

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

from slime.config import EvalSet, SlimeConfig
from slime.data.template import tokenize
from slime.rollout.groups import GroupMaker, together
from slime.rollout.metrics import error_frac, example, response_lengths
from slime.types import EvalResult, Group, Prompt

SUCCESS = 1.0  # a reward of at least this counts as solved in pass_at_k


async def evaluate_set(
    name: str, eval_set: EvalSet, prompts: list[Prompt], maker: GroupMaker, cfg: SlimeConfig, finished: Callable[[], None]
) -> EvalResult:
    """Answer and judge every prompt of a set, `samples` times each; `finished` is called for each that was asked.

    A prompt longer than data.max_prompt_tokens counts as not solved; an answer whose reward failed is left out.
    """
    tokenized = [(p, tokenize(p, maker.client.tokenizer, cfg.data)) for p in prompts]
    asked = [(p, ids) for p, ids in tokenized if ids is not None]

    async def answered(prompt: Prompt, ids: list[int]) -> Group:
        group = await maker.make(prompt, ids, eval_set.samples)
        finished()
        return group

    groups = await together(answered(p, ids) for p, ids in asked)
    rewards: list[list[float | None]] = [[s.reward for s in g.samples] for g in groups]
    rewards += [[0.0] * eval_set.samples] * (len(prompts) - len(asked))
    metrics = scores(rewards, eval_set.samples)
    metrics |= response_lengths([s for g in groups for s in g.samples])
    metrics["reward_error_frac"] = error_frac(maker.judged)
    metrics["too_long_frac"] = 1 - len(asked) / len(prompts)
    return EvalResult(name, metrics, [example(g.samples[0]) for g in spread(groups, cfg.observe.examples)])


def scores(rewards: list[list[float | None]], k: int) -> dict[str, float]:
    """accuracy: mean reward of each prompt's first answer. avg_at_k and pass_at_k over its k answers, where k > 1.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374). None, a reward that failed, is left out.
    """
    accuracy = {"accuracy": mean([r[0] for r in rewards if r[0] is not None])}
    if k == 1:
        return accuracy
    known = [found for r in rewards if (found := [x for x in r if x is not None])]
    solved = [pass_at_k(len(r), sum(x >= SUCCESS for x in r), min(k, len(r))) for r in known]
    return {**accuracy, "avg_at_k": mean([mean(r) for r in known]), "pass_at_k": mean(solved)}


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n answers, c of them right, hold a right one."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def spread(groups: list[Group], count: int) -> list[Group]:
    """`count` groups, evenly over the set."""
    return groups[:: max(1, len(groups) // count)][:count] if count else []
