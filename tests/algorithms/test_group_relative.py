"""Advantages relative to a group, against exact fractions, sample by sample."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.group_relative import centred, leave_one_out, standardised

ALL = [centred, standardised, leave_one_out]
rows = st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(-2, 4)), min_size=1, max_size=24)


def reference(kind: Callable, rewards: list[float], group: list[int]) -> list[float]:
    out = []
    for i, reward in enumerate(rewards):
        own = [Fraction(r) for r, g in zip(rewards, group, strict=True) if g == group[i]]
        others = [Fraction(r) for j, r in enumerate(rewards) if group[j] == group[i] and j != i]
        mean = sum(own) / len(own)
        if kind is centred:
            out.append(float(reward - mean))
        elif kind is leave_one_out:
            out.append(float(reward - sum(others) / len(others)) if others else 0.0)
        else:
            variance = sum((r - mean) ** 2 for r in own) / (len(own) - 1) if others else Fraction(0)
            out.append(float(reward - mean) / (math.sqrt(variance) + 1e-6))
    return out


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=50, deadline=None)
@given(rows)
def test_every_kind_follows_its_paper(kind, rows):
    rewards, group = map(list, zip(*rows, strict=True))
    got = kind(np.array(rewards), np.array(group))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference(kind, rewards, group), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=50, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_any_interleaving_and_any_ids_give_the_same(kind, rows, random):
    """Peers take the group from the position."""
    rewards, group = map(np.array, zip(*rows, strict=True))
    order = list(range(len(rows)))
    random.shuffle(order)
    plain = kind(rewards, group)
    np.testing.assert_allclose(kind(rewards[order], group[order]), plain[order], rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(kind(rewards, 10**12 - 977 * group), plain, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("kind", ALL)
def test_groups_of_four_three_and_four_are_no_single_group(kind):
    """Peers normalise the whole batch as one group when groups differ in size: the group of fives got -1.09 there (slime #1414)."""
    rewards = np.array([5.0] * 4 + [9.0, 9.0, 12.0] + [4.0, 6.0, 8.0, 10.0])
    group = np.repeat([7, 1, 3], [4, 3, 4])
    got = kind(rewards, group)
    assert got[:4].tolist() == [0.0] * 4
    np.testing.assert_allclose(got, reference(kind, rewards.tolist(), group.tolist()), rtol=1e-12)


def test_a_worked_example():
    rewards, group = np.array([1.0, 5.0, 0.0, 5.0, 0.0, 7.0]), np.array([9, 4, 9, 4, 9, 1])
    std = math.sqrt(1 / 3) + 1e-6
    np.testing.assert_allclose(centred(rewards, group), [2 / 3, 0, -1 / 3, 0, -1 / 3, 0], rtol=1e-12)
    np.testing.assert_allclose(standardised(rewards, group), [2 / 3 / std, 0, -1 / 3 / std, 0, -1 / 3 / std, 0], rtol=1e-12)
    np.testing.assert_allclose(leave_one_out(rewards, group), [1, 0, -0.5, 0, -0.5, 0], rtol=1e-12)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3e5, 1e300, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 49])
def test_a_group_of_equal_rewards_has_no_advantage(kind, reward, size):
    got = kind(np.array([reward] * size + [1.0, 2.0]), np.array([3] * size + [8, 8]))
    assert (got[:size] == 0).all() and (got[size:] != 0).all()


@pytest.mark.parametrize("kind", ALL)
def test_a_group_of_one_has_no_advantage(kind):
    """Peers divide by the std of one sample, which is NaN."""
    assert kind(np.array([4.2, 1.0, 2.0]), np.array([0, 1, 1]))[0] == 0


@pytest.mark.parametrize("kind", ALL)
def test_no_group_feels_another(kind):
    rewards, group = np.array([0.3, 1.0, 0.7, 2.0, -1.0]), np.array([0, 1, 0, 1, 1])
    changed = np.where(group == 1, rewards * 1e6 + 5, rewards)
    assert kind(rewards, group)[group == 0].tolist() == kind(changed, group)[group == 0].tolist()
    assert kind(rewards, group)[group == 0].tolist() == kind(rewards[group == 0], group[group == 0]).tolist()


@pytest.mark.parametrize("kind", ALL)
def test_what_all_answers_of_a_group_share_does_not_count(kind):
    rewards, group = np.array([0.5, 1.0, 0.25, 2.0]), np.array([0, 0, 1, 1])
    assert kind(rewards + 1024 * (1 + group), group).tolist() == kind(rewards, group).tolist()


def test_only_the_standardised_advantage_forgets_the_scale_of_rewards():
    rewards, group = np.array([0.0, 1.0, 3.0, 2.0]), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(standardised(100 * rewards, group), standardised(rewards, group), atol=2e-6)
    for kind in (centred, leave_one_out):
        np.testing.assert_allclose(kind(100 * rewards, group), 100 * kind(rewards, group), rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ALL)
def test_a_reward_that_is_not_finite_is_our_bug(kind, bad):
    with pytest.raises(AssertionError, match="finite"):
        kind(np.array([bad, 1.0]), np.array([0, 0]))


def test_rewards_whose_squares_no_double_holds_are_not_taken_for_equal():
    with np.errstate(over="ignore"):
        got = standardised(np.array([1e200, -1e200, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert np.isnan(got[:2]).all() and np.isfinite(got[2:]).all()


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_of_no_samples_has_no_advantages(kind):
    assert kind(np.zeros(0), np.zeros(0, np.int64)).shape == (0,)
