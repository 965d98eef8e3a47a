"""Knobs of the algorithm that do not go together: each refusal names the knob, its value and the mend."""

import math
import re

import pytest

from slime.config import AlgorithmConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.check_algorithm import SWITCHES, check_algorithm
from slime.config.exits import ConfigError

INFINITY = "infinity is .inf in a file, inf in an override"
MEND = r"must be two numbers|widen it|remove it|: set |: choose |: lower |: raise |must be (above|at least)|without algorithm\."

UNREAD = [
    (
        {"name": "grpo", "lam": 0.5},
        "algorithm.lam=0.5 has no effect with algorithm.name=grpo: remove it, or choose one that reads it (ppo)",
    ),
    (
        {"name": "reinforce_pp_baseline", "gamma": 0.9},
        "algorithm.gamma=0.9 has no effect with algorithm.name=reinforce_pp_baseline: "
        "remove it, or choose one that reads it (reinforce_pp, ppo)",
    ),
    (
        {"name": "rloo", "normalize": False},
        "algorithm.normalize=false has no effect with algorithm.name=rloo: "
        "remove it, or choose one that reads it (grpo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo)",
    ),
    (
        {"name": "gspo", "kl_reward_coef": 0.1},
        "algorithm.kl_reward_coef=0.1 has no effect with algorithm.name=gspo: "
        "remove it, or choose one that reads it (reinforce_pp, reinforce_pp_baseline, ppo)",
    ),
    (
        {"name": "cispo", "clip_dual": 3.0},
        "algorithm.clip_dual=3 has no effect with algorithm.name=cispo: "
        "remove it, or choose one that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, opd)",
    ),
    (
        {"name": "sft", "importance": "token"},
        "algorithm.importance=token has no effect with algorithm.name=sft: "
        "remove it, or choose one that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd)",
    ),
    (
        {"name": "sft", "importance_reject": {"token": [0.5, 2.0], "lowest": [1e-4, math.inf]}},
        "algorithm.importance_reject=token,lowest has no effect with algorithm.name=sft: "
        "remove it, or choose one that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd)",
    ),
    (
        {"name": "sft", "opsm_delta": 1e-4},
        "algorithm.opsm_delta=0.0001 has no effect with algorithm.name=sft: "
        "remove it, or choose one that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd)",
    ),
    (
        {"name": "sft", "entropy_coef": 0.01},
        "algorithm.entropy_coef=0.01 has no effect with algorithm.name=sft: "
        "remove it, or choose one that reads it (grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd)",
    ),
]
SWITCHED_OFF = [
    (
        {"name": "grpo", "importance_low": 0.5},
        "algorithm.importance_low=0.5 has no effect with algorithm.importance=none: remove it, or set algorithm.importance",
    ),
    (
        {"name": "grpo", "importance_high": 5.0},
        "algorithm.importance_high=5 has no effect with algorithm.importance=none: remove it, or set algorithm.importance",
    ),
    (
        {"name": "grpo", "distill_coef": 0.5},
        "algorithm.distill_coef=0.5 has no effect with algorithm.distill=none: remove it, or set algorithm.distill",
    ),
    (
        {"name": "grpo", "distill_beta": 0.1},
        "algorithm.distill_beta=0.1 has no effect with algorithm.distill=none: remove it, or set algorithm.distill",
    ),
    (
        {"name": "grpo", "distill_top_k": 4},
        "algorithm.distill_top_k=4 has no effect with algorithm.distill=none: remove it, or set algorithm.distill",
    ),
]
CONTRADICTORY = [
    (
        {"name": "grpo", "kl_estimator": "k3"},
        "algorithm.kl_estimator=k3 has no effect without algorithm.kl_loss_coef or algorithm.kl_reward_coef",
    ),
    (
        {"name": "ppo", "kl_loss_coef": 0.1, "kl_reward_coef": 0.2},
        "algorithm.kl_loss_coef=0.1 counts the KL twice beside algorithm.kl_reward_coef=0.2: set one of them to 0",
    ),
    (
        {"name": "grpo", "kl_loss_coef": 0.1, "kl_estimator": "k1"},
        "algorithm.kl_estimator=k1 as a loss has a gradient of expectation 0: choose k2, k3 or unbiased",
    ),
    (
        {"name": "ppo", "kl_reward_coef": 0.1, "kl_estimator": "unbiased"},
        "algorithm.kl_estimator=unbiased is of a loss, algorithm.kl_loss_coef: choose k1, k2 or k3 for a KL in the reward",
    ),
    ({"name": "opd"}, "algorithm.distill=none leaves algorithm.name=opd nothing to learn: choose sampled, topk or full"),
    (
        {"name": "grpo", "distill": "sampled", "distill_beta": 0.0},
        "algorithm.distill_beta=0 has no effect with algorithm.distill=sampled, which is the reverse KL: remove it, or choose topk or full",
    ),
    ({"name": "grpo", "distill": "full", "distill_top_k": 4}, "algorithm.distill_top_k=4 has no effect without algorithm.distill=topk"),
    (
        {"name": "grpo", "importance": "token", "importance_low": 3.0},
        "algorithm.importance_low=3 is above algorithm.importance_high=2: lower it",
    ),
    (
        {"name": "grpo", "reference_every": 5},
        "algorithm.reference_every=5 has no effect without algorithm.kl_loss_coef or algorithm.kl_reward_coef: there is no reference",
    ),
    (
        {"name": "opd", "distill": "full", "clip_low": 0.1},
        "algorithm.clip_low=0.1 has no effect with algorithm.distill=full, whose loss has no policy gradient: remove it",
    ),
    (
        {"name": "opd", "distill": "topk", "importance_reject": {"token": [0.5, 2.0]}},
        "algorithm.importance_reject=token has no effect with algorithm.distill=topk, whose loss has no policy gradient: remove it",
    ),
    (
        {"name": "opd", "distill": "full", "opsm_delta": 0.1},
        "algorithm.opsm_delta=0.1 has no effect with algorithm.distill=full, whose loss has no policy gradient: remove it",
    ),
    (
        {"name": "grpo", "importance_normalize": True},
        "algorithm.importance_normalize=true has no effect with algorithm.importance=none and no algorithm.importance_reject, where all "
        "weights are 1: remove it, or set one of them",
    ),
]
REJECT = [
    ("tokens", [0.5, 2.0], ": no such level: choose token, sequence, geometric, lowest; did you mean token?"),
    ("mean", [0.5, 2.0], ": no such level: choose token, sequence, geometric, lowest"),
    *(
        ("token", bounds, f"=[{said}]: must be two numbers, the lowest and the highest ratio that is kept; {INFINITY}")
        for bounds, said in (
            ([], ""),
            ([0.5], "0.5"),
            ([0.5, 1, 2], "0.5, 1, 2"),
            ([0.5, ".inf"], "0.5, .inf"),
            ([None, 2.0], "none, 2"),
            ([True, 2.0], "true, 2"),
            ([[1, 2], 3], "[1, 2], 3"),
        )
    ),
    ("geometric", [math.nan, 2.0], "=[nan, 2]: must be at least 0, as ratios are"),
    ("geometric", [0.5, math.nan], "=[0.5, nan]: must be at least 0, as ratios are"),
    ("sequence", [-0.5, 2.0], "=[-0.5, 2]: must be at least 0, as ratios are"),
    ("sequence", [2.0, 0.5], "=[2, 0.5]: the first is above the second: lower it"),
    ("lowest", [0, math.inf], "=[0, inf] has no effect, as it keeps every ratio from 2e-09 to 5e+08: remove it, or narrow it"),
    ("lowest", [1e-9, 1e9], "=[1e-09, 1e+09] has no effect, as it keeps every ratio from 2e-09 to 5e+08: remove it, or narrow it"),
    ("token", [0, 0.0], "=[0, 0] would reject every token, as ratios lie from 2e-09 to 5e+08: widen it"),
    ("token", [1e9, math.inf], "=[1e+09, inf] would reject every token, as ratios lie from 2e-09 to 5e+08: widen it"),
]
CONTRADICTORY += [
    ({"name": "grpo", "importance_reject": {level: bounds}}, f"algorithm.importance_reject.{level}{text}") for level, bounds, text in REJECT
]
REFUSALS = UNREAD + SWITCHED_OFF + CONTRADICTORY


def refusal(knobs: dict) -> str:
    with pytest.raises(ConfigError) as raised:
        check_algorithm(AlgorithmConfig(**knobs))
    return str(raised.value)


@pytest.mark.parametrize(("knobs", "text"), REFUSALS, ids=str)
def test_a_refusal_names_knob_and_value(knobs, text):
    assert refusal(knobs) == text


@pytest.mark.parametrize("knobs", [knobs for knobs, _ in REFUSALS], ids=str)
def test_a_refusal_names_the_mend(knobs):
    assert re.search(MEND, refusal(knobs))


def test_every_knob_with_a_switch_is_refused_without_it():
    assert {next(knob for knob in SWITCHES if knob in knobs) for knobs, _ in SWITCHED_OFF} == SWITCHES.keys()


@pytest.mark.parametrize(
    "knobs",
    [
        *({"name": name} for name in ALGORITHMS if name != "opd"),
        *({"name": "opd", "distill": distill} for distill in ("sampled", "topk", "full")),
        {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token"},  # DAPO
        {"normalize": False, "aggregation": "constant"},  # Dr.GRPO
        {"clip_dual": 3.0, "entropy_coef": 0.01},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"importance": "token", "importance_high": 5.0},  # TIS
        {"importance": "token", "importance_high": 5.0, "importance_reject": {"token": [0.5, 5]}},  # IcePop
        {"importance": "token", "importance_reject": {"geometric": [0.99, 1.01], "lowest": [1e-4, math.inf]}},  # MIS
        {"importance_reject": {"sequence": [0, 2], "token": [1, 1]}},
        {"importance_reject": {"lowest": [0.5, 1e12]}, "importance_normalize": True},
        {"importance": "sequence", "importance_normalize": True},
        {"opsm_delta": 1e-4},
        {"importance": "geometric", "importance_low": 2.0, "importance_high": 2.0},
        {"kl_loss_coef": 0.1},
        {"kl_loss_coef": 0.1, "kl_estimator": "k3"},
        {"kl_loss_coef": 0.1, "kl_estimator": "unbiased"},
        {"name": "ppo", "kl_reward_coef": 0.1, "kl_estimator": "k1", "gamma": 0.99, "lam": 0.95},
        {"distill": "sampled", "distill_coef": 0.5},
        {"distill": "topk", "distill_top_k": 4, "distill_beta": 0.1},
        {"distill": "full", "distill_beta": 0.0},
        {"name": "somewhere.mine:build", "lam": 0.5, "gamma": 0.9, "normalize": False, "kl_reward_coef": 0.1, "clip_dual": 2.0},
    ],
    ids=str,
)
def test_what_goes_together_passes(knobs):
    assert check_algorithm(AlgorithmConfig(**knobs)) is None


def test_a_knob_at_its_default_is_never_refused():
    defaults = {name: getattr(AlgorithmConfig(), name) for name in AlgorithmConfig.__dataclass_fields__ if name != "name"}
    assert check_algorithm(AlgorithmConfig("sft", **defaults)) is None
