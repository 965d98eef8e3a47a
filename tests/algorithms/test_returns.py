"""Returns and advantages of tokens, against sums written out over the trainable tokens of each sequence."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.returns import discounted, gae, terminal

masks = st.lists(st.lists(st.booleans(), max_size=9), max_size=6)
factors = st.sampled_from([0.0, 0.5, 0.9, 0.97, 1.0])


def pack(masks: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([m for row in masks for m in row], bool), np.cumsum([0, *map(len, masks)])


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def steps_of(mask: np.ndarray, cu_seqlens: np.ndarray) -> list[list[int]]:
    """Positions of the trainable tokens, a list for every sequence."""
    bounds = cu_seqlens.tolist()
    return [[t for t in range(a, b) if mask[t]] for a, b in pairwise(bounds)]


def reference_discounted(rewards, mask, cu_seqlens, gamma) -> list[float]:
    """G_t = sum_k gamma^k r_{t+k}."""
    out = [0.0] * len(rewards)
    for steps in steps_of(mask, cu_seqlens):
        for i, t in enumerate(steps):
            out[t] = sum(gamma**k * rewards[u] for k, u in enumerate(steps[i:]))
    return out


def reference_gae(rewards, values, mask, cu_seqlens, gamma, lam) -> tuple[list[float], list[float]]:
    """Equations 11 and 16 of arXiv 1506.02438: A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for steps in steps_of(mask, cu_seqlens):
        following = {t: values[u] for t, u in pairwise(steps)}
        for i, t in enumerate(steps):
            errors = [rewards[u] + gamma * following.get(u, 0.0) - values[u] for u in steps[i:]]
            advantages[t] = sum((gamma * lam) ** k * error for k, error in enumerate(errors))
            returns[t] = advantages[t] + values[t]
    return advantages, returns


@settings(max_examples=50, deadline=None)
@given(masks, factors, factors, st.integers(0, 99))
def test_the_scan_over_a_padded_matrix_equals_the_loop_over_each_sequence(masks, gamma, lam, seed):
    mask, cu_seqlens = pack(masks)
    rewards, values = noise(len(mask), seed), noise(len(mask), seed + 100)
    got = gae(rewards, values, mask, cu_seqlens, gamma, lam)
    for ours, expected in zip(got, reference_gae(rewards, values, mask, cu_seqlens, gamma, lam), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)
    expected = reference_discounted(rewards, mask, cu_seqlens, gamma)
    np.testing.assert_allclose(discounted(rewards, mask, cu_seqlens, gamma), expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(masks, st.integers(0, 99))
def test_a_reward_lies_on_the_last_trainable_token_of_its_sequence(masks, seed):
    mask, cu_seqlens = pack(masks)
    rewards = noise(len(masks), seed)
    expected = [0.0] * len(mask)
    for reward, steps in zip(rewards, steps_of(mask, cu_seqlens), strict=True):
        if steps:
            expected[steps[-1]] = reward
    assert terminal(rewards, mask, cu_seqlens).tolist() == expected


def test_tool_tokens_at_the_end_take_no_reward():
    """Peers put it on the last response token whatever the mask says."""
    mask, cu_seqlens = pack([[False, True, True, False, False], [False, True]])
    assert terminal(np.array([3.0, -1.0]), mask, cu_seqlens).tolist() == [0, 0, 3, 0, 0, 0, -1]


def test_a_sequence_without_a_trainable_token_keeps_nothing_of_its_reward():
    mask, cu_seqlens = pack([[True], [False, False, False], [], [False, True]])
    assert terminal(np.array([1.0, 50.0, 60.0, 2.0]), mask, cu_seqlens).tolist() == [1, 0, 0, 0, 0, 2]


def test_gae_steps_over_tool_tokens():
    """Peers run it across them, which discounts once more for each and takes the critic's word about them."""
    mask, cu_seqlens = pack([[False, True, False, False, True]])
    values = np.array([9.0, 1.0, 7.0, -7.0, 2.0])
    advantages, returns = gae(np.array([0.0, 0, 0, 0, 4.0]), values, mask, cu_seqlens, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0, 0.5 * 2 - 1 + 0.25 * 2, 0, 0, 2]
    assert returns.tolist() == [0, 1.5, 0, 0, 4]


@settings(max_examples=50, deadline=None)
@given(masks, factors, factors, st.integers(0, 99))
def test_leaving_masked_tokens_out_of_the_batch_changes_nothing(masks, gamma, lam, seed):
    mask, cu_seqlens = pack(masks)
    rewards, values = noise(len(mask), seed), noise(len(mask), seed + 100)
    _, short = pack([[m for m in row if m] for row in masks])
    everything = np.ones(mask.sum(), bool)
    for ours, alone in zip(
        gae(rewards, values, mask, cu_seqlens, gamma, lam),
        gae(rewards[mask], values[mask], everything, short, gamma, lam),
        strict=True,
    ):
        assert ours[mask].tolist() == alone.tolist()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e9])
def test_masked_tokens_are_zero_and_have_no_influence(garbage):
    mask, cu_seqlens = pack([[False, True, True, False, True, False], [False, False], [False, True, False]])
    rewards, values = noise(11, 0), noise(11, 1)
    dirty = np.where(mask, rewards, garbage), np.where(mask, values, garbage)
    clean = *gae(rewards, values, mask, cu_seqlens, 0.9, 0.8), discounted(rewards, mask, cu_seqlens, 0.9)
    again = *gae(*dirty, mask, cu_seqlens, 0.9, 0.8), discounted(dirty[0], mask, cu_seqlens, 0.9)
    for one, other in zip(clean, again, strict=True):
        assert one.tolist() == other.tolist()
        assert (one[~mask] == 0).all() and (one[mask] != 0).all()


def test_no_sequence_feels_another():
    mask, cu_seqlens = pack([[True] * 4, [True] * 3, [True] * 5])
    rewards, values = noise(12, 0), noise(12, 1)
    second = np.arange(12) // 4 == 1
    second[7] = False
    changed = gae(np.where(second, 1e9, rewards), np.where(second, -1e9, values), mask, cu_seqlens, 1.0, 0.95)
    for one, other in zip(gae(rewards, values, mask, cu_seqlens, 1.0, 0.95), changed, strict=True):
        assert one[~second].tolist() == other[~second].tolist()


def test_undiscounted_advantages_are_what_is_still_to_come_less_the_value():
    mask, cu_seqlens = pack([[False, True, False, True, True], [True, True]])
    rewards, values = noise(7, 0), noise(7, 1)
    advantages, returns = gae(rewards, values, mask, cu_seqlens, 1.0, 1.0)
    r, v = rewards, values
    to_come = [0, r[1] + r[3] + r[4], 0, r[3] + r[4], r[4], r[5] + r[6], r[6]]
    np.testing.assert_allclose(returns, to_come, rtol=1e-12)
    np.testing.assert_allclose(advantages, np.where(mask, to_come - v, 0), rtol=1e-12)


def test_with_lambda_one_the_returns_know_nothing_of_the_critic():
    mask, cu_seqlens = pack([[False, True, False, True, True], [True, True]])
    rewards = noise(7, 0)
    _, returns = gae(rewards, 100 * noise(7, 1), mask, cu_seqlens, 0.9, 1.0)
    np.testing.assert_allclose(returns, discounted(rewards, mask, cu_seqlens, 0.9), rtol=1e-10, atol=1e-12)


def test_with_lambda_zero_an_advantage_looks_one_step_ahead():
    mask, cu_seqlens = pack([[True, False, True]])
    advantages, _ = gae(np.array([1.0, 0.0, 2.0]), np.array([10.0, 0.0, 30.0]), mask, cu_seqlens, 0.5, 0.0)
    assert advantages.tolist() == [1 + 0.5 * 30 - 10, 0, 2 - 30]


def test_a_critic_that_knows_every_return_leaves_no_advantage():
    mask, cu_seqlens = pack([[False, True, False, True, True], [True, True]])
    rewards = noise(7, 0)
    advantages, _ = gae(rewards, discounted(rewards, mask, cu_seqlens, 0.9), mask, cu_seqlens, 0.9, 0.7)
    np.testing.assert_allclose(advantages, 0, atol=1e-14)
