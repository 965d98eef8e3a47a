"""What losses and targets have in common, term by term; and the batch that the tests of the algorithms work through."""

import math
import statistics
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from slime.algorithms.base import LossInputs, LossOutputs, Step
from slime.algorithms.policy_loss import Clip
from slime.algorithms.terms import asked_for, clip_of, from_teacher, kl_in_reward, per_token, with_common_terms
from slime.config import AlgorithmConfig
from slime.config.algorithms import REJECT_LEVELS
from slime.types import Batch
from tests.algorithms.local import make_inputs

# Two groups that lie between each other, and a group of one. Sample 0 has a tool's answer in its middle, of sample 5 nothing is trained.
MASKS = [[0, 0, 1, 1, 0, 1], [0, 1], [0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0], [0, 1, 1]]
REWARDS = [1.0, 5.0, 0.0, 2.0, 0.25, 3.0, 0.7]
GROUP = [9, 4, 9, 4, 9, 4, 1]
COLUMNS = ("old_logprobs", "ref_logprobs", "teacher_logprobs", "values")


def make_batch(masks=MASKS, rewards=REWARDS, group=GROUP) -> Batch:
    """A batch with these loss masks, one list a sample."""
    lengths = [len(mask) for mask in masks]
    return Batch(
        tokens=np.zeros(sum(lengths), np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        loss_mask=np.array([m for mask in masks for m in mask], bool),
        rollout_logprobs=np.zeros(sum(lengths), np.float32),
        rewards=np.array(rewards, np.float64),
        group=np.array(group, np.int64),
        version=np.zeros(len(masks), np.int64),
    )


def make_step(batch: Batch | None = None) -> Step:
    """All that an algorithm may ask for, as the trainer gives it: float32, 0 outside the mask."""
    batch, rng = make_batch() if batch is None else batch, np.random.default_rng(0)
    columns = {name: np.where(batch.loss_mask, rng.normal(-1, 0.5, len(batch.tokens)), 0).astype(np.float32) for name in COLUMNS}
    return Step(batch, **columns)


def spoilt(step: Step) -> Step:
    """The same step with nonsense on every token outside the mask."""
    mask = step.batch.loss_mask
    return Step(step.batch, **{name: np.where(mask, getattr(step, name), np.float32("nan")) for name in COLUMNS})


def trained(batch: Batch, n: int) -> list[int]:
    """Where the trainable tokens of sample n lie."""
    return [t for t in range(batch.cu_seqlens[n], batch.cu_seqlens[n + 1]) if batch.loss_mask[t]]


def spread(batch: Batch, values: list[float]) -> list[float]:
    """A sample's value on its trainable tokens, 0 elsewhere."""
    out = [0.0] * len(batch.tokens)
    for n, value in enumerate(values):
        for t in trained(batch, n):
            out[t] = value
    return out


def others(batch: Batch, n: int, itself: bool) -> list[float]:
    """Rewards of the answers to sample n's prompt, with or without its own."""
    return [float(batch.rewards[m]) for m in range(len(batch)) if batch.group[m] == batch.group[n] and (itself or m != n)]


def whitened(batch: Batch, values: list[float]) -> list[float]:
    """Mean 0 and variance 1 over the trainable tokens."""
    chosen = [v for v, m in zip(values, batch.loss_mask, strict=True) if m]
    mean, scale = statistics.fmean(chosen), math.sqrt(statistics.variance(chosen) + 1e-8)
    return [(v - mean) / scale if m else 0.0 for v, m in zip(values, batch.loss_mask, strict=True)]


def estimate(kind: str, policy: float, other: float) -> float:
    """Schulman's k1, k2 and k3 of one token that the policy drew."""
    d = policy - other
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def kind_of(cfg: AlgorithmConfig) -> str:
    """What `auto` stands for."""
    return ("k1" if cfg.kl_reward_coef else "k2") if cfg.kl_estimator == "auto" else cfg.kl_estimator


def token_rewards(step: Step, cfg: AlgorithmConfig) -> list[float]:
    """-coef * kl of every trainable token, and the sample's reward on the last one."""
    out = [0.0] * len(step.batch.tokens)
    for n in range(len(step.batch)):
        at = trained(step.batch, n)
        for t in at:
            out[t] = -cfg.kl_reward_coef * estimate(kind_of(cfg), float(step.old_logprobs[t]), float(step.ref_logprobs[t]))
        if at:
            out[at[-1]] += float(step.batch.rewards[n])
    return out


def teaching(step: Step, coef: float) -> list[float]:
    """coef * (log teacher - log student) of every trainable token."""
    pairs = zip(step.teacher_logprobs.tolist(), step.old_logprobs.tolist(), step.batch.loss_mask, strict=True)
    return [coef * (teacher - student) if m else 0.0 for teacher, student, m in pairs]


def ppo_loss(ratio: float, a: float, low: float, high: float, dual: float | None = None) -> float:
    """Equation 7 of arXiv 1707.06347, negated; equation 4 of arXiv 1912.09729 where the advantage is negative."""
    gain = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
    return -max(gain, dual * a) if dual is not None and a < 0 else -gain


def ratios(x: LossInputs) -> list[float]:
    return [math.exp(new - old) for new, old in zip(x.logprobs.tolist(), x.old_logprobs.tolist(), strict=True)]


def after_updates(loss: Callable[[LossInputs], LossOutputs], updates: int = 3, rate: float = 0.15) -> LossInputs:
    """24 tokens after some optimizer steps on one batch, so that ratios are not 1."""
    x = make_inputs(24, shift=0.0)
    for _ in range(updates):
        gradient = slope(loss(x).loss.sum(), x.logprobs)
        x.logprobs = (x.logprobs.detach() - rate * gradient).requires_grad_()
    return x


def slope(of: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(of, by)[0]


def replaced(x: LossInputs, **changes) -> LossInputs:
    return LossInputs(**{name: getattr(x, name) for name in LossInputs.__slots__} | changes)


def gradients_agree_with_finite_differences(loss: Callable[[LossInputs], LossOutputs], x: LossInputs) -> bool:
    def total(logprobs, entropy, distillation):
        return loss(replaced(x, logprobs=logprobs, entropy=entropy, distillation=distillation)).loss

    return torch.autograd.gradcheck(total, (x.logprobs, x.entropy, x.distillation))


# Targets


def test_a_samples_value_lies_on_its_trainable_tokens():
    batch = make_batch()
    assert per_token(batch, np.arange(1.0, 8.0)).tolist() == spread(batch, list(range(1, 8)))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "auto"])
def test_the_kl_in_the_reward_is_the_estimate_times_its_coefficient(kind):
    step, cfg = make_step(), AlgorithmConfig(kl_reward_coef=0.3, kl_estimator=kind)
    pairs = zip(step.old_logprobs.tolist(), step.ref_logprobs.tolist(), step.batch.loss_mask, strict=True)
    expected = [0.3 * estimate(kind_of(cfg), policy, reference) if m else 0.0 for policy, reference, m in pairs]
    found, metrics = kl_in_reward(step, cfg)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert metrics == {"train/ref_kl": pytest.approx(sum(expected) / 0.3 / step.batch.loss_mask.sum())}


def test_the_teacher_adds_what_it_prefers_to_the_student():
    step = make_step()
    np.testing.assert_allclose(from_teacher(step, AlgorithmConfig(distill="sampled", distill_coef=0.7)), teaching(step, 0.7), rtol=1e-12)


@pytest.mark.parametrize("distill", ["none", "topk", "full"])
def test_only_sampled_distillation_is_an_advantage(distill):
    assert not from_teacher(Step(make_batch()), AlgorithmConfig(distill=distill)).any()


@pytest.mark.parametrize("term", [lambda step, cfg: kl_in_reward(step, cfg)[0], from_teacher], ids=["kl", "teacher"])
def test_tokens_outside_the_mask_have_no_term(term):
    cfg = AlgorithmConfig(kl_reward_coef=0.3, distill="sampled")
    got = term(spoilt(make_step()), cfg)
    np.testing.assert_array_equal(got, term(make_step(), cfg))
    assert got.any() and not got[~make_batch().loss_mask].any()


def test_without_a_coefficient_no_reference_is_read():
    found, metrics = kl_in_reward(Step(make_batch()), AlgorithmConfig())
    assert not found.any() and not metrics


# The loss


def reference_weight(x: LossInputs, cfg: AlgorithmConfig, t: int) -> float:
    """w of one token: held by its bounds, and 0 where a level rejects it."""
    d = [old - rollout for old, rollout in zip(x.old_logprobs.tolist(), x.rollout_logprobs.tolist(), strict=True)]
    own = [d[i] for i in range(len(d)) if x.sequences.of[i] == x.sequences.of[t]]
    ratios = {"token": d[t], "sequence": math.fsum(own), "geometric": statistics.fmean(own), "lowest": min(own)}
    ratios = {level: math.exp(log_ratio) for level, log_ratio in ratios.items()}
    if not all(low <= ratios[level] <= high for level, (low, high) in cfg.importance_reject.items()):
        return 0.0
    return 1.0 if cfg.importance == "none" else min(max(ratios[cfg.importance], cfg.importance_low), cfg.importance_high)


def dropped(x: LossInputs, delta: float | None, t: int) -> bool:
    """Where M of arXiv 2512.02556 is 0."""
    own = [i for i in range(len(x.logprobs)) if x.sequences.of[i] == x.sequences.of[t]]
    mean = statistics.fmean([float(x.rollout_logprobs[i] - x.logprobs[i]) for i in own])
    return delta is not None and float(x.advantages[t]) < 0 and mean > delta


def reference_loss(x: LossInputs, cfg: AlgorithmConfig, policy: list[float]) -> list[float]:
    """M * scale * w * policy loss - c_H H + c_KL KL + c_D D, token by token."""
    out = []
    for t, own in enumerate(policy):
        weighed = cfg.importance != "none" or cfg.importance_reject
        total = x.importance_scale * reference_weight(x, cfg, t) * own if weighed else own
        total = 0.0 if dropped(x, cfg.opsm_delta, t) else total
        total -= cfg.entropy_coef * float(x.entropy[t])
        unbiased = cfg.kl_estimator == "unbiased"
        kl = estimate("k3" if unbiased else kind_of(cfg), float(x.logprobs[t]), float(x.ref_logprobs[t]))
        total += cfg.kl_loss_coef * kl * (ratios(x)[t] if unbiased else 1.0)
        out.append(total + (cfg.distill_coef * float(x.distillation[t]) if cfg.distill in ("topk", "full") else 0.0))
    return out


BOUNDS = {"token": [0.8, 1.3], "sequence": [0.7, 1.5], "geometric": [0.9, 1.1], "lowest": [0.85, math.inf]}
ICEPOP = {"importance": "token", "importance_high": 1.05, "importance_reject": {"token": [0.9, 1.1]}}
TERMS = [
    {},
    {"entropy_coef": 0.1},
    {"kl_loss_coef": 0.3},
    {"kl_loss_coef": 0.3, "kl_estimator": "k2"},
    {"kl_loss_coef": 0.3, "kl_estimator": "k3"},
    {"kl_loss_coef": 0.3, "kl_estimator": "unbiased"},
    {"distill": "topk", "distill_coef": 0.6},
    {"distill": "full", "distill_coef": 0.6},
    {"distill": "sampled", "distill_coef": 0.6},
    *({"importance": level, "importance_low": 0.9, "importance_high": 1.1} for level in ("token", "sequence", "geometric")),
    *({"importance_reject": {level: BOUNDS[level]}} for level in REJECT_LEVELS),
    ICEPOP,
    {"importance": "token", "importance_high": 1.2, "importance_reject": {"geometric": BOUNDS["geometric"], "lowest": BOUNDS["lowest"]}},
    {"opsm_delta": 0.02},
    {"importance_reject": BOUNDS, "importance": "geometric", "importance_high": 1.05, "opsm_delta": 0.02, "entropy_coef": 0.1}
    | {"kl_loss_coef": 0.3, "kl_estimator": "unbiased", "distill": "full", "distill_coef": 0.6},
]


def test_every_choice_of_a_term_is_among_them():
    """But for k1, which is refused as a loss; auto is k2."""
    for knob, besides in (("kl_estimator", {"k1"}), ("importance", set()), ("distill", set())):
        field = next(field for field in fields(AlgorithmConfig) if field.name == knob)
        assert {terms.get(knob, field.default) for terms in TERMS} == set(field.metadata["choices"]) - besides
    assert {level for terms in TERMS for level in terms.get("importance_reject", {})} == set(REJECT_LEVELS)


def away_from_the_engine() -> LossInputs:
    """Weights of some tokens and sequences lie below their bounds, of some between, and of some above; some of bad ones are off-policy."""
    x = make_inputs(24)
    x.importance_scale = 1.7
    x.rollout_logprobs = x.old_logprobs + 0.2 * torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x


def policy_loss(x: LossInputs) -> LossOutputs:
    """Of no algorithm: -A (log p)^2."""
    return LossOutputs(-x.advantages * x.logprobs.square(), {"clip_frac": torch.zeros_like(x.advantages)})


def with_terms(x: LossInputs, **terms) -> LossOutputs:
    return with_common_terms(x, AlgorithmConfig(**terms), policy_loss(x))


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_loss_is_the_sum_of_its_terms(terms):
    x = away_from_the_engine()
    expected = reference_loss(x, AlgorithmConfig(**terms), policy_loss(x).loss.tolist())
    np.testing.assert_allclose(with_terms(x, **terms).loss.tolist(), expected, rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_gradients_of_the_terms_agree_with_finite_differences(terms):
    assert gradients_agree_with_finite_differences(lambda x: with_terms(x, **terms), away_from_the_engine())


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("reject", [{}, {"token": [0.9, 1.1]}], ids=str)
def test_importance_multiplies_the_policy_loss_and_nothing_else(level, reject):
    x = away_from_the_engine()
    importance = {"importance": level, "importance_reject": reject, "importance_low": 0.9, "importance_high": 1.1}
    rest = {"entropy_coef": 0.1, "kl_loss_coef": 0.3, "distill": "full"}
    out, plain = with_terms(x, **importance, **rest), with_terms(x, **rest)
    weights = torch.tensor([reference_weight(x, AlgorithmConfig(**importance), t) for t in range(24)], dtype=torch.float64)
    assert 0 < out.metrics["importance_bounded_frac"].sum() < 24
    torch.testing.assert_close(out.loss - plain.loss, (1.7 * weights - 1) * policy_loss(x).loss)
    assert torch.equal(slope(out.loss.sum(), x.entropy), torch.full((24,), -0.1, dtype=torch.float64))


def test_weights_of_0_leave_the_other_terms_alone():
    x = away_from_the_engine()
    x.rollout_logprobs = x.old_logprobs - 3.0
    rest = {"entropy_coef": 0.1, "kl_loss_coef": 0.3, "distill": "topk", "distill_coef": 0.6}
    out = with_terms(x, **ICEPOP, **rest)
    np.testing.assert_allclose(out.loss.tolist(), reference_loss(x, AlgorithmConfig(**rest), [0.0] * 24), rtol=1e-9)


def test_weights_are_those_of_the_engine_and_not_of_the_update():
    x = away_from_the_engine()
    moved = replaced(x, logprobs=(x.logprobs + 0.5).detach().requires_grad_())
    first, second = (with_terms(inputs, importance="token").metrics["importance"] for inputs in (x, moved))
    assert torch.equal(first, second)


def test_dropped_tokens_leave_the_other_terms_alone():
    """And have no gradient but theirs; the metric of the policy loss is of all tokens."""
    x = away_from_the_engine()
    x.rollout_logprobs, x.advantages = x.logprobs.detach() + 1.0, -x.advantages.abs()
    rest = {"entropy_coef": 0.1, "distill": "topk", "distill_coef": 0.6}
    out = with_terms(x, opsm_delta=0.5, **rest)
    np.testing.assert_allclose(out.loss.tolist(), reference_loss(x, AlgorithmConfig(**rest), [0.0] * 24), rtol=1e-9)
    assert not slope(out.loss.sum(), x.logprobs).any() and out.metrics["opsm_frac"].all()
    assert torch.equal(out.metrics["pg_loss"], policy_loss(x).loss)


@pytest.mark.parametrize("terms", [terms for terms in TERMS if terms.keys() & {"importance", "importance_reject", "opsm_delta"}], ids=str)
def test_some_tokens_are_weighed_and_some_left_out(terms):
    """So that the tests of these terms say something of them."""
    x = away_from_the_engine()
    metrics = with_terms(x, **terms).metrics
    for name in ("importance_bounded_frac", "importance_rejected_frac", "opsm_frac"):
        assert name not in metrics or 0 < metrics[name].sum() < 24, name


def test_an_engine_that_agrees_with_the_trainer_changes_nothing():
    x = replaced(away_from_the_engine(), importance_scale=1.0)
    x.rollout_logprobs = x.old_logprobs
    out = with_terms(x, importance="sequence", importance_reject={level: [0.99, 1.01] for level in REJECT_LEVELS})
    assert torch.equal(out.loss, policy_loss(x).loss)
    assert not out.metrics["importance_bounded_frac"].any() and not out.metrics["importance_rejected_frac"].any()
    x.rollout_logprobs = x.logprobs.detach()
    out = with_terms(x, opsm_delta=1e-12)
    assert torch.equal(out.loss, policy_loss(x).loss) and not out.metrics["opsm_frac"].any()


# Metrics


@pytest.mark.parametrize(
    ("terms", "names"),
    [
        ({}, set()),
        ({"importance": "token"}, {"importance", "importance_bounded_frac"}),
        ({"importance_reject": BOUNDS}, {"importance", "importance_rejected_frac"}),
        ({"opsm_delta": 0.1}, {"opsm_frac"}),
        ({"kl_loss_coef": 0.1}, {"ref_kl"}),
        ({"kl_reward_coef": 0.1}, set()),
        ({"distill": "topk"}, {"distillation"}),
        ({"distill": "full"}, {"distillation"}),
        ({"distill": "sampled"}, set()),
    ],
)
def test_metrics_are_per_token_named_and_without_gradient(terms, names):
    metrics = with_terms(make_inputs(6), **terms).metrics
    assert metrics.keys() == {"pg_loss", "entropy", "kl", "clip_frac"} | names
    assert all(value.shape == (6,) and not value.requires_grad for value in metrics.values())


def test_metrics_say_what_their_names_say():
    x = away_from_the_engine()
    weighed = {"importance": "token", "importance_high": 1.1, "importance_reject": {"lowest": [0.85, math.inf]}}
    terms = {"entropy_coef": 0.1, "kl_loss_coef": 0.3, "kl_estimator": "k3", "distill": "full", "opsm_delta": 0.02}
    metrics = with_terms(x, **weighed, **terms).metrics
    cfg, logprobs, old, reference = AlgorithmConfig(**weighed), *(v.tolist() for v in (x.logprobs, x.old_logprobs, x.ref_logprobs))
    own = [x.sequences.of == number for number in x.sequences.of]
    lowest = [math.exp((x.old_logprobs - x.rollout_logprobs)[mine].min()) for mine in own]
    expected = {
        "pg_loss": policy_loss(x).loss.tolist(),  # before the weights
        "entropy": x.entropy.tolist(),
        "kl": [estimate("k3", drew, now) for drew, now in zip(old, logprobs, strict=True)],
        "ref_kl": [estimate("k3", now, other) for now, other in zip(logprobs, reference, strict=True)],  # before its coefficient
        "importance": [reference_weight(x, cfg, t) for t in range(24)],  # before the scale
        "importance_bounded_frac": [
            float(math.exp(a - b) > 1.1) for a, b in zip(x.old_logprobs.tolist(), x.rollout_logprobs.tolist(), strict=True)
        ],
        "importance_rejected_frac": [float(ratio < 0.85) for ratio in lowest],
        "opsm_frac": [float(dropped(x, 0.02, t)) for t in range(24)],
        "distillation": x.distillation.tolist(),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name].tolist(), values, rtol=1e-9, atol=1e-12, err_msg=name)


# Bounds, and what is asked for


@pytest.mark.parametrize(
    ("given", "ppo", "gspo", "cispo"),
    [
        ({}, (0.2, 0.2), (3e-4, 4e-4), (1.0, 4.0)),
        ({"clip_low": 0.1}, (0.1, 0.1), (0.1, 4e-4), (0.1, 4.0)),
        ({"clip_high": 0.28}, (0.2, 0.28), (3e-4, 0.28), (1.0, 0.28)),
        ({"clip_low": 0.0, "clip_high": 0.5}, (0.0, 0.5), (0.0, 0.5), (0.0, 0.5)),
        ({"clip_low": 0.3, "clip_high": 0.0}, (0.3, 0.0), (0.3, 0.0), (0.3, 0.0)),
    ],
    ids=str,
)
def test_bounds_are_the_recipes_or_the_algorithms_own(given, ppo, gspo, cispo):
    cfg = AlgorithmConfig(**given)
    assert [clip_of(cfg), clip_of(cfg, 3e-4, 4e-4), clip_of(cfg, 1.0, 4.0)] == [Clip(*bounds) for bounds in (ppo, gspo, cispo)]


def test_dual_clip_is_the_recipes():
    assert clip_of(AlgorithmConfig()).dual is None and clip_of(AlgorithmConfig(clip_dual=3.0), 3e-4, 4e-4).dual == 3.0


@pytest.mark.parametrize(
    ("terms", "old", "reference"),
    [
        ({"importance_reject": BOUNDS}, False, False),
        ({"importance_reject": BOUNDS, "importance_normalize": True}, True, False),
        ({"opsm_delta": 0.1}, False, False),
        ({}, False, False),
        ({"kl_loss_coef": 0.1}, False, True),
        ({"kl_reward_coef": 0.1}, True, True),
        ({"distill": "sampled"}, True, False),
        ({"distill": "topk"}, False, False),
        ({"importance": "token"}, False, False),
    ],
)
def test_terms_ask_for_what_they_read(terms, old, reference):
    asked = asked_for(AlgorithmConfig(**terms))
    assert (asked.pop("importance_scale") is not None) == ("importance_normalize" in terms)
    assert asked == {"needs_old_logprobs": old, "uses_reference": reference}
