import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms import grpo
from slime.algorithms.base import LossInputs
from slime.algorithms.policy_loss import k3
from slime.config import AlgorithmConfig
from slime.types import Batch


def make_batch(rewards, group) -> Batch:
    """One prompt token and one response token a sample."""
    n = len(rewards)
    return Batch(
        tokens=np.zeros(2 * n, np.int32),
        cu_seqlens=np.arange(0, 2 * n + 1, 2, dtype=np.int64),
        loss_mask=np.tile([False, True], n),
        rollout_logprobs=np.zeros(2 * n, np.float32),
        rewards=np.array(rewards, np.float64),
        group=np.array(group, np.int64),
        version=np.zeros(n, np.int64),
    )


def make_inputs(t: int, seed: int = 0, shift: float = 0.3) -> LossInputs:
    """float64, with old log-probs near the current ones, so that some ratios are clipped and some are not."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(t, generator=g, dtype=torch.float64)

    logprobs = -normal().abs() - 0.1
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() + shift * normal(),
        entropy=normal().abs().requires_grad_(),
        advantages=normal(),
        rollout_logprobs=logprobs.detach() + 0.01 * normal(),
        sample=torch.arange(t) // 3,
    )


def reference_advantages(rewards, group, normalize_std):
    """Section 4.1.2 of arXiv 2402.03300 (outcome supervision), sample by sample."""
    out = []
    for reward, own in zip(rewards, group, strict=True):
        others = [r for r, g in zip(rewards, group, strict=True) if g == own]
        mean = sum(others) / len(others)
        scale = 1.0
        if normalize_std and len(others) > 1:
            scale = (sum((r - mean) ** 2 for r in others) / (len(others) - 1)) ** 0.5 + 1e-6
        out.append((reward - mean) / scale)
    return np.array(out)


samples = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 4)), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(samples, st.booleans(), st.randoms())
def test_advantages_follow_the_paper_and_the_ids_alone(rows, normalize_std, random):
    rewards, group = zip(*rows, strict=True)
    got = grpo.advantages(make_batch(rewards, group), normalize_std)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference_advantages(rewards, group, normalize_std), rtol=1e-6, atol=1e-8)

    order = list(range(len(rows)))
    random.shuffle(order)  # any interleaving of the groups
    shuffled = grpo.advantages(make_batch(np.array(rewards)[order], np.array(group)[order]), normalize_std)
    np.testing.assert_allclose(shuffled, got[order], rtol=1e-6, atol=1e-8)


def test_advantages_of_a_worked_example_with_unequal_groups():
    got = grpo.advantages(make_batch([1.0, 5.0, 0.0, 5.0, 0.0, 7.0], [9, 4, 9, 4, 9, 1]), normalize_std=True)
    std = np.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) + 1e-6
    np.testing.assert_allclose(got, [2 / 3 / std, 0, -1 / 3 / std, 0, -1 / 3 / std, 0], rtol=1e-12)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3e5, 0.0])
def test_a_group_of_equal_rewards_has_exactly_zero_advantage(reward, normalize_std):
    got = grpo.advantages(make_batch([reward] * 7 + [1.0, 2.0], [3] * 7 + [8, 8]), normalize_std)
    assert (got[:7] == 0).all() and (got[7:] != 0).all()


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_one_has_zero_advantage(normalize_std):
    assert grpo.advantages(make_batch([4.2], [0]), normalize_std).tolist() == [0.0]


def test_std_normalisation_makes_advantages_independent_of_the_scale_of_rewards():
    rewards, group = [0.0, 1.0, 3.0, 2.0], [0, 0, 1, 1]
    scaled = [100 * r for r in rewards]
    one, hundred = (grpo.advantages(make_batch(r, group), True) for r in (rewards, scaled))
    np.testing.assert_allclose(one, hundred, atol=2e-6)
    np.testing.assert_allclose(grpo.advantages(make_batch(scaled, group), False), [-50, 50, 50, -50])


def test_a_reward_that_is_not_finite_is_our_bug():
    with pytest.raises(AssertionError, match="finite"):
        grpo.advantages(make_batch([float("nan"), 1.0], [0, 0]), True)


def reference_loss(x: LossInputs, low: float, high: float, entropy_coef: float) -> np.ndarray:
    """Equation 7 of arXiv 1707.06347, negated, token by token."""
    out = []
    for logp, old, a, h in zip(x.logprobs.tolist(), x.old_logprobs.tolist(), x.advantages.tolist(), x.entropy.tolist(), strict=True):
        r = np.exp(logp - old)
        out.append(-min(r * a, min(max(r, 1 - low), 1 + high) * a) - entropy_coef * h)
    return np.array(out)


@pytest.mark.parametrize(("low", "high", "coef"), [(0.2, None, 0.0), (0.2, 0.28, 0.0), (0.1, 0.4, 0.01), (0.0, 0.0, 0.0)])
def test_loss_follows_the_paper(low, high, coef):
    x = make_inputs(64)
    out = grpo.loss(x, AlgorithmConfig(clip_low=low, clip_high=high, entropy_coef=coef))
    expected = reference_loss(x, low, low if high is None else high, coef)
    np.testing.assert_allclose(out.loss.detach().numpy(), expected, rtol=1e-12)


def test_gradients_agree_with_finite_differences():
    x = make_inputs(32)
    cfg = AlgorithmConfig(clip_low=0.2, clip_high=0.3, entropy_coef=0.05)

    def total(logprobs, entropy):
        return grpo.loss(LossInputs(logprobs, x.old_logprobs, entropy, x.advantages, x.rollout_logprobs, x.sample), cfg).loss

    clip_frac = grpo.loss(x, cfg).metrics["clip_frac"]
    assert 0 < clip_frac.sum() < 32  # both branches are under test
    assert torch.autograd.gradcheck(total, (x.logprobs, x.entropy))


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_on_policy_gradient_is_the_score_times_minus_the_advantage(clip):
    x = make_inputs(16, shift=0.0)
    out = grpo.loss(x, AlgorithmConfig(clip_low=clip, clip_high=clip))
    (grad,) = torch.autograd.grad(out.loss.sum(), x.logprobs)
    assert torch.equal(grad, -x.advantages)
    assert out.metrics["clip_frac"].sum() == 0 and out.metrics["kl"].abs().max() == 0


def test_a_clipped_token_passes_no_gradient_and_is_counted():
    x = make_inputs(4)
    x.old_logprobs = x.logprobs.detach() - torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)  # ratios e, e, 1/e, 1/e
    x.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    out = grpo.loss(x, AlgorithmConfig())
    (grad,) = torch.autograd.grad(out.loss.sum(), x.logprobs)
    assert (grad == 0).tolist() == [True, False, False, True]
    assert out.metrics["clip_frac"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_an_absurd_ratio_stays_finite(gap, advantage):
    logprobs = torch.tensor([-1.0], requires_grad=True)
    fixed = torch.tensor([advantage])
    x = LossInputs(logprobs, torch.tensor([-1.0 - gap]), torch.zeros(1), fixed, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    out = grpo.loss(x, AlgorithmConfig())
    (grad,) = torch.autograd.grad(out.loss.sum(), logprobs)
    assert all(torch.isfinite(v).all() for v in (out.loss, grad, *out.metrics.values()))


def test_metrics_are_per_token_and_carry_no_gradient():
    out = grpo.loss(make_inputs(5), AlgorithmConfig(entropy_coef=0.1))
    assert out.metrics.keys() == {"pg_loss", "entropy", "clip_frac", "kl"}
    assert all(v.shape == (5,) and not v.requires_grad for v in out.metrics.values())


def test_k3_is_nonnegative_and_estimates_kl_of_old_against_current():
    generator = torch.Generator().manual_seed(0)
    old, current = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (old.exp() * (old - current)).sum()
    per_token = k3(current, old)
    assert (per_token >= 0).all()
    torch.testing.assert_close((old.exp() * per_token).sum(), exact)  # the expectation over tokens drawn from old


@pytest.mark.parametrize(
    "change", [{"normalize_std": False}, {"clip_low": 0.05}, {"clip_high": 0.9}, {"entropy_coef": 0.1}], ids=lambda c: next(iter(c))
)
def test_every_option_changes_an_output(change):
    batch = make_batch(np.arange(60) % 7, np.arange(60) % 11)

    def outputs(cfg):
        algorithm = grpo.build(cfg)
        x = make_inputs(60, shift=1.0)
        x.advantages = torch.from_numpy(algorithm.advantages(batch))
        return algorithm.loss(x).loss.detach()

    assert not torch.equal(outputs(AlgorithmConfig()), outputs(AlgorithmConfig(**change)))
