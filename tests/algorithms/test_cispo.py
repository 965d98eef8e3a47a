"""CISPO: GRPO's advantages, and a bounded ratio that weighs a gradient which no token loses."""

import numpy as np
import pytest
import torch

from slime.algorithms import cispo, grpo
from slime.config import AlgorithmConfig
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import after_updates, make_step, ratios, replaced, slope

CLIPS = [
    ({}, (1.0, 4.0)),
    ({"clip_low": 0.2}, (0.2, 4.0)),
    ({"clip_high": 0.1}, (1.0, 0.1)),
    ({"clip_low": 0.1, "clip_high": 0.5}, (0.1, 0.5)),
]


def bounded(x, low: float, high: float) -> list[float]:
    return [min(max(ratio, 1 - low), 1 + high) for ratio in ratios(x)]


def test_targets_are_grpos():
    step = make_step()
    for cfg in (AlgorithmConfig("cispo"), AlgorithmConfig("cispo", normalize=False), AlgorithmConfig("cispo", distill="sampled")):
        np.testing.assert_array_equal(cispo.build(cfg).targets(step).advantages, grpo.targets(step, cfg).advantages)


@pytest.mark.parametrize("far", [False, True], ids=["after several updates", "far"])
@pytest.mark.parametrize(("given", "bounds"), CLIPS, ids=str)
def test_loss_and_gradient_follow_the_paper(given, bounds, far):
    """Equation 4 of arXiv 2506.13585, negated: -sg(clip(r)) A log p. Finite differences would differentiate the ratio too; for those that
    hold it see below."""
    loss = cispo.build(AlgorithmConfig("cispo", **given)).loss
    x = make_inputs(24, shift=1.5) if far else after_updates(loss)
    out, advantages = loss(x), x.advantages.tolist()
    slopes = [-ratio * a for ratio, a in zip(bounded(x, *bounds), advantages, strict=True)]
    np.testing.assert_allclose(out.loss.tolist(), [s * p for s, p in zip(slopes, x.logprobs.tolist(), strict=True)], rtol=1e-9)
    np.testing.assert_allclose(slope(out.loss.sum(), x.logprobs).tolist(), slopes, rtol=1e-9)
    held = [float(not 1 - bounds[0] <= ratio <= 1 + bounds[1]) for ratio in ratios(x)]
    assert out.metrics["clip_frac"].tolist() == held


@pytest.mark.parametrize("far", [False, True], ids=["after several updates", "far"])
@pytest.mark.parametrize(("given", "bounds"), CLIPS, ids=str)
def test_gradients_agree_with_finite_differences_that_hold_the_ratio(given, bounds, far):
    """The old log-probs go along with the current ones, so that no ratio moves: what is left is the slope of A log p times sg(clip(r)). Of
    one log-prob at a time, as each token's loss is its own; with importance weights, which the step holds likewise."""
    loss = cispo.build(AlgorithmConfig("cispo", **given, importance="token", importance_low=0.9, importance_high=1.1)).loss
    x, h = make_inputs(24, shift=1.5) if far else after_updates(loss), 1e-6

    def moved(by: float) -> torch.Tensor:
        columns = {name: getattr(x, name) + by for name in ("logprobs", "old_logprobs", "rollout_logprobs")}
        return loss(replaced(x, **columns)).loss.detach()

    difference = (moved(h) - moved(-h)) / (2 * h)
    torch.testing.assert_close(slope(loss(x).loss.sum(), x.logprobs), difference, rtol=1e-6, atol=1e-9)


def test_gradients_of_the_other_terms_are_added():
    x = make_inputs(24, shift=1.0)
    rest = {"entropy_coef": 0.1, "kl_loss_coef": 0.2, "distill": "full", "distill_coef": 0.6}
    plain, more = (cispo.loss(x, AlgorithmConfig("cispo", **knobs)).loss.sum() for knobs in ({}, rest))
    kl = 0.2 * (x.logprobs - x.ref_logprobs).detach()  # k2
    torch.testing.assert_close(slope(more, x.logprobs) - slope(plain, x.logprobs), kl)
    assert torch.equal(slope(more, x.entropy), torch.full((24,), -0.1, dtype=torch.float64))
    assert torch.equal(slope(more, x.distillation), torch.full((24,), 0.6, dtype=torch.float64))


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    x = make_inputs(16, shift=0.0)
    assert torch.equal(slope(cispo.loss(x, AlgorithmConfig("cispo")).loss.sum(), x.logprobs), -x.advantages)


@pytest.mark.parametrize("bounds", [{}, {"clip_low": 0.2, "clip_high": 0.2}], ids=str)
def test_a_token_that_ppo_clips_keeps_its_gradient(bounds):
    x = make_inputs(24, shift=1.0)
    dropped = slope(grpo.loss(x, AlgorithmConfig()).loss.sum(), x.logprobs) == 0
    kept = slope(cispo.loss(x, AlgorithmConfig("cispo", **bounds)).loss.sum(), x.logprobs)
    assert dropped.any() and (kept != 0).all()
    assert torch.equal(kept.sign(), -x.advantages.sign())
