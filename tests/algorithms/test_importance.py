"""Weights for tokens that another policy drew: token by token, and exactly by enumeration what they are on average."""

import math
import statistics
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.base import Step
from slime.algorithms.importance import LEVELS, Importance, importance_scale, importance_weights
from slime.algorithms.policy_loss import Clip, clipped, ratio_of
from slime.algorithms.sequences import SequencesHere
from slime.config import AlgorithmConfig
from slime.config.algorithms import REJECT_LEVELS
from tests.algorithms.local import LocalSequences, expected_gradient, make_logits, softmax
from tests.algorithms.test_terms import make_batch

WEIGHTS = ("token", "sequence", "geometric")
UNBOUNDED = {"importance_low": 0.0, "importance_high": math.inf}
tokens = st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=12)
rejections = st.dictionaries(st.sampled_from(REJECT_LEVELS), st.tuples(st.floats(0.3, 1), st.floats(1, 3)).map(list))


def reference_ratio(level: str, gaps: list[float], sample: list[int], t: int) -> float:
    """MIS: the log-ratio of the token, or of its sequence the sum, the mean, or the least, which its veto looks at."""
    own = [gap for gap, s in zip(gaps, sample, strict=True) if s == sample[t]]
    return math.exp({"token": gaps[t], "sequence": math.fsum(own), "geometric": statistics.fmean(own), "lowest": min(own)}[level])


def reference(gaps: list[float], sample: list[int], cfg: AlgorithmConfig) -> list[tuple[float, float, float]]:
    """(weight, bounded, rejected) of every token."""
    found = []
    for t in range(len(gaps)):
        ratios = {level: reference_ratio(level, gaps, sample, t) for level in REJECT_LEVELS}
        w = ratios.get(cfg.importance, 1.0)
        low, high = (cfg.importance_low, cfg.importance_high) if cfg.importance != "none" else (1.0, 1.0)
        rejected = any(ratios[level] < least or ratios[level] > most for level, (least, most) in cfg.importance_reject.items())
        found.append((0.0 if rejected else min(max(w, low), high), float(w < low or w > high), float(rejected)))
    return found


def importance_of(gaps, sample, **knobs) -> Importance:
    gaps = torch.as_tensor(gaps, dtype=torch.float64)
    given = gaps - 5, torch.full_like(gaps, -5.0), LocalSequences(torch.as_tensor(sample))
    return importance_weights(*given, AlgorithmConfig(**knobs))


def weights_of(gaps, sample, importance="none", **knobs) -> torch.Tensor:
    return importance_of(gaps, sample, importance=importance, **knobs).weights


def test_the_levels_are_those_of_the_knobs():
    assert tuple(LEVELS) == REJECT_LEVELS and set(WEIGHTS) == set(REJECT_LEVELS) - {"lowest"}


@pytest.mark.parametrize("level", ["none", *WEIGHTS])
@settings(max_examples=50, deadline=None)
@given(tokens, rejections)
def test_every_level_follows_its_formula(level, given, reject):
    gaps, sample = [((g - 5) - -5.0) for g, _ in given], [s for _, s in given]
    knobs = {"importance": level, "importance_low": 0.7, "importance_high": 1.6, "importance_reject": reject}
    expected = reference(gaps, sample, AlgorithmConfig(**knobs))
    ratios = [reference_ratio(name, gaps, sample, t) for name in REJECT_LEVELS for t in range(len(gaps))]
    bounds = [0.7, 1.6, *(bound for pair in reject.values() for bound in pair)]
    if min(abs(ratio / bound - 1) for ratio in ratios for bound in bounds) < 1e-12:
        return  # on which side of a bound it lies is a matter of rounding
    got = importance_of(gaps, sample, **knobs)
    for column, values in zip((got.weights, got.bounded, got.rejected), zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(column.tolist(), values, rtol=1e-9)


@pytest.mark.parametrize("level", REJECT_LEVELS)
def test_an_engine_that_agrees_changes_nothing(level):
    logprobs = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    for importance in ("none", *WEIGHTS):
        cfg = AlgorithmConfig(importance=importance, importance_low=0.5, importance_reject={level: [1.0, 1.0]})
        found = importance_weights(logprobs, logprobs, LocalSequences(torch.arange(9) // 4), cfg)
        assert (found.weights == 1).all() and not found.bounded.any() and not found.rejected.any()


def test_the_weight_of_a_token_is_one_on_average():
    trainer, engine = (softmax(z.tolist()) for z in make_logits(2, 8))
    gaps = [math.log(a / b) for a, b in zip(trainer, engine, strict=True)]
    weights = weights_of(gaps, list(range(8)), "token", **UNBOUNDED)
    assert math.fsum(b * w for b, w in zip(engine, weights.tolist(), strict=True)) == pytest.approx(1, abs=1e-12)


def test_the_weight_of_a_sequence_is_one_on_average_and_the_geometric_one_is_less():
    """Over all 27 sequences of three tokens, each token drawn from a distribution that depends on the one before."""
    trainer, engine = ([softmax(z) for z in table.tolist()] for table in make_logits(2, 4, 3))
    drawn, gaps = [], []
    for sequence in product(range(3), repeat=3):
        rows = [3, *sequence[:-1]]
        drawn.append(math.prod(engine[row][a] for row, a in zip(rows, sequence, strict=True)))
        gaps += [math.log(trainer[row][a] / engine[row][a]) for row, a in zip(rows, sequence, strict=True)]
    sample = [i for i in range(27) for _ in range(3)]

    def mean(level: str) -> float:
        weights = weights_of(gaps, sample, level, **UNBOUNDED).tolist()
        return math.fsum(p * w for p, w in zip(drawn, weights[::3], strict=True))

    assert mean("sequence") == pytest.approx(1, abs=1e-12)
    assert mean("geometric") < 0.99


def test_bounds_hold_weights_and_rejection_drops_them():
    gaps = [math.log(w) for w in (0.1, 0.5, 1.0, 2.0, 8.0)]
    held = importance_of(gaps, range(5), importance="token", importance_low=0.4, importance_high=3.0)
    np.testing.assert_allclose(held.weights.tolist(), [0.4, 0.5, 1.0, 2.0, 3.0], rtol=1e-12)
    assert held.bounded.tolist() == [1, 0, 0, 0, 1] and not held.rejected.any()
    icepop = importance_of(gaps, range(5), importance="token", importance_high=5.0, importance_reject={"token": [0.4, 3.0]})
    np.testing.assert_allclose(icepop.weights.tolist(), [0.0, 0.5, 1.0, 2.0, 0.0], rtol=1e-12)
    assert icepop.rejected.tolist() == [1, 0, 0, 0, 1]


# ratios of two sequences, and what each level leaves of them
TWO = [math.log(w) for w in (0.05, 4.0, 4.0, 0.9, 1.0, 1.2)]


@pytest.mark.parametrize(
    ("reject", "kept"),
    [
        ({"token": [0.1, 3]}, [0, 0, 0, 1, 1, 1]),
        ({"token": [0.1, 5]}, [0, 1, 1, 1, 1, 1]),
        ({"sequence": [0.5, 2]}, [1, 1, 1, 1, 1, 1]),  # 0.8 and 1.08
        ({"sequence": [0.9, 2]}, [0, 0, 0, 1, 1, 1]),
        ({"geometric": [0.9, 1.1]}, [1, 1, 1, 1, 1, 1]),  # 0.93 and 1.03
        ({"geometric": [0.9, 1.0]}, [1, 1, 1, 0, 0, 0]),
        ({"lowest": [0.1, math.inf]}, [0, 0, 0, 1, 1, 1]),
        ({"lowest": [0, 0.1]}, [1, 1, 1, 0, 0, 0]),
        ({"lowest": [0.01, 0.95]}, [1, 1, 1, 1, 1, 1]),
        ({"token": [0.1, 5], "geometric": [0.9, 1.0]}, [0, 1, 1, 0, 0, 0]),
        ({"geometric": [0.9, 1.0], "lowest": [0.1, math.inf]}, [0] * 6),
    ],
    ids=str,
)
def test_every_level_must_hold_and_what_is_kept_weighs_1(reject, kept):
    assert weights_of(TWO, [0, 0, 0, 1, 1, 1], importance_reject=reject).tolist() == kept


@pytest.mark.parametrize(("level", "expected"), [("sequence", [8, 8, 8, 0.25, 8]), ("geometric", [8**0.25] * 3 + [0.25, 8**0.25])])
def test_all_tokens_of_a_sequence_share_its_weight_wherever_they_lie(level, expected):
    weights = weights_of([math.log(w) for w in (4, 4, 0.25, 0.25, 2)], [7, 7, 7, 1, 7], level, **UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), expected, rtol=1e-12)


@pytest.mark.parametrize("level", WEIGHTS)
def test_no_sequence_feels_another(level):
    sample = [0, 1, 0, 1, 0]
    one, other = (weights_of(gaps, sample, level, **UNBOUNDED) for gaps in ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, -0.7, 0.3, 3.0, 0.5]))
    assert one[::2].tolist() == other[::2].tolist() and (one[1::2] != other[1::2]).all()


@pytest.mark.parametrize("level", WEIGHTS)
def test_weights_carry_no_gradient(level):
    old, rollout = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cfg = AlgorithmConfig(importance=level, importance_reject={name: [0.5, 2.0] for name in REJECT_LEVELS})
    found = importance_weights(old, rollout, LocalSequences(torch.tensor([0, 0, 1, 1])), cfg)
    assert not (found.weights.requires_grad or found.bounded.requires_grad or found.rejected.requires_grad)


@pytest.mark.parametrize("gap", [300.0, -300.0, math.inf, -math.inf])
@pytest.mark.parametrize("level", WEIGHTS)
def test_an_absurd_difference_gives_a_finite_weight_that_the_bounds_see(gap, level):
    weights = weights_of([gap, gap], [0, 0], level, **UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), math.exp(math.copysign(20, gap)), rtol=1e-12)
    assert importance_of([gap, gap], [0, 0], importance=level, importance_low=0.5).bounded.tolist() == [1, 1]


@pytest.mark.parametrize("gap", [300.0, -300.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("level", REJECT_LEVELS)
def test_an_absurd_difference_is_rejected(gap, level):
    """Of one sequence; another is kept."""
    assert weights_of([gap, gap, 0.0], [0, 0, 1], importance_reject={level: [0.5, 2.0]}).tolist() == [0, 0, 1]


def test_an_absurd_token_is_held_before_its_sequence_is_summed():
    weights = weights_of([300.0, -20.0, -1.0, -1.0], [0, 0, 0, 0], "sequence", **UNBOUNDED)
    np.testing.assert_allclose(weights.tolist(), math.exp(-2), rtol=1e-12)


def test_weight_times_clipped_loss_is_decoupled_ppo():
    """Tokens of the engine, ratios to the trainer's old weights: on average the gradient of PPO on tokens of those (arXiv 2110.00641)."""
    policy, old, engine = make_logits(3, 6, seed=2)
    log_old, log_engine = old.log_softmax(-1), engine.log_softmax(-1)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1, -1.0], dtype=torch.float64)
    unbounded = AlgorithmConfig(importance="token", **UNBOUNDED)
    weights = importance_weights(log_old, log_engine, LocalSequences(torch.arange(6)), unbounded).weights

    def ppo(logprobs):
        return clipped(ratio_of(logprobs - log_old), advantages, Clip(0.2, 0.2))[0]

    corrected = expected_gradient(policy, lambda x: weights * ppo(x), softmax(engine.tolist()))
    on_old, uncorrected = (expected_gradient(policy, ppo, softmax(z.tolist())) for z in (old, engine))
    np.testing.assert_allclose(corrected, on_old, atol=1e-12)
    assert max(abs(a - b) for a, b in zip(uncorrected, on_old, strict=True)) > 0.01


# The scale of a batch

MASKS = [[0, 0, 1, 1, 0, 1], [0, 1], [0, 1, 1, 1], [0, 0, 0], [0, 1, 1, 0, 1, 1]]
SCALED = [
    *({"importance": level} for level in WEIGHTS),
    *({"importance_reject": {level: [0.8, 1.3]}} for level in REJECT_LEVELS),
    {"importance": "token", "importance_high": 1.2, "importance_reject": {"lowest": [0.7, math.inf], "geometric": [0.5, 1.15]}},
]


def make_step(spread: float = 0.3) -> Step:
    """Five answers, of one of which nothing is trained. float32, 0 outside the mask, as the trainer gives it."""
    batch, rng = make_batch(MASKS, [0.0] * 5, [0] * 5), np.random.default_rng(1)
    old = np.where(batch.loss_mask, rng.normal(-1, 0.5, len(batch.tokens)), 0).astype(np.float32)
    drawn = np.where(batch.loss_mask, old - rng.normal(0, spread, len(old)), 0).astype(np.float32)
    return Step(replace(batch, rollout_logprobs=drawn), old_logprobs=old)


def reference_weights(step: Step, cfg: AlgorithmConfig) -> list[float]:
    """Of the trained tokens of the batch, by the reference above."""
    at = np.flatnonzero(step.batch.loss_mask)
    gaps = [float(step.old_logprobs[t]) - float(step.batch.rollout_logprobs[t]) for t in at]
    return [weight for weight, _, _ in reference(gaps, step.batch.sample_of_token[at].tolist(), cfg)]


@pytest.mark.parametrize("knobs", SCALED, ids=str)
def test_the_scale_makes_the_mean_of_the_weights_1(knobs):
    cfg, step = AlgorithmConfig(**knobs), make_step()
    weights = reference_weights(step, cfg)
    assert len(set(weights)) > 1, "they differ"
    scale = importance_scale(step, cfg)
    assert scale == pytest.approx(len(weights) / math.fsum(weights), rel=1e-9) and abs(scale - 1) > 1e-3
    assert statistics.fmean([scale * weight for weight in weights]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("knobs", SCALED, ids=str)
def test_the_scale_does_not_depend_on_order_or_on_tokens_outside_the_mask(knobs):
    cfg, step = AlgorithmConfig(**knobs), make_step()
    order = np.array([3, 1, 4, 0, 2])
    moved = Step(step.batch.select(order), old_logprobs=step.old_logprobs[step.batch.tokens_at(order)])
    assert importance_scale(moved, cfg) == pytest.approx(importance_scale(step, cfg), rel=1e-12)
    nonsense = np.where(step.batch.loss_mask, 0, np.nan).astype(np.float32)
    spoilt = replace(step.batch, rollout_logprobs=step.batch.rollout_logprobs + nonsense)
    assert importance_scale(Step(spoilt, old_logprobs=step.old_logprobs + nonsense), cfg) == importance_scale(step, cfg)


def test_the_scale_is_1_where_all_weights_are_0_or_1_and_nothing_is_divided_by_0():
    rejecting = AlgorithmConfig(importance="token", importance_reject={"token": [50, 60]})
    assert set(reference_weights(make_step(), rejecting)) == {0.0} and importance_scale(make_step(), rejecting) == 1.0
    assert importance_scale(make_step(spread=0.0), AlgorithmConfig(importance="sequence")) == 1.0
    step = make_step()
    untrained = Step(replace(step.batch, loss_mask=np.zeros_like(step.batch.loss_mask)), old_logprobs=step.old_logprobs)
    assert importance_scale(untrained, rejecting) == 1.0


def test_sequences_here_are_what_they_say():
    """Sums, means and minima against the tests' own; a sequence without a token among them is felt by none."""
    sample = torch.tensor([4, 0, 4, 2, 0, 4])
    x = make_logits(6).requires_grad_()
    ours, expected = SequencesHere(sample, 6), LocalSequences(sample)
    for name in ("sum", "mean", "min"):
        torch.testing.assert_close(getattr(ours, name)(x), getattr(expected, name)(x))
    assert ours.sum(x).requires_grad and ours.mean(x).requires_grad and not ours.min(x).requires_grad
