"""DAPO's dynamic sampling: which groups have anything to teach (arXiv 2503.14476, section 3.2)."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.group_relative import standardised
from slime.rollout.filters import mixed_rewards
from slime.types import Group, Sample


def group_of(rewards: list[float], penalty: float | None = None) -> Group:
    made = [Sample("p", [1], 5, i, reward=reward, penalty=penalty if i else None) for i, reward in enumerate(rewards)]
    return Group(5, made)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8))
def test_groups_of_right_and_wrong_answers_stay(rewards: list[float]) -> None:
    """Equation 11: 0 < right answers < all answers."""
    assert mixed_rewards(group_of(rewards)) == (0 < sum(rewards) < len(rewards))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8))
def test_the_bound_is_a_deviation_of_a_millionth(rewards: list[float]) -> None:
    spread = statistics.stdev(rewards)
    if not 9e-7 < spread < 1.1e-6:
        assert mixed_rewards(group_of(rewards)) == (spread > 1e-6)


def test_rewards_that_rounding_alone_tells_apart_are_equal() -> None:
    """0.1 + 0.2 and 0.3: their advantages would be 0 too, in every digit that counts."""
    rewards = [0.1 + 0.2, 0.3, 0.3]
    assert rewards[0] != rewards[1] and not mixed_rewards(group_of(rewards))
    assert np.abs(standardised(np.array(rewards), np.zeros(3, int))).max() < 1e-9


@pytest.mark.parametrize("rewards", [[1.0], [0.0], [0.5, 0.5]])
def test_a_group_of_one_or_of_equals_goes(rewards: list[float]) -> None:
    assert not mixed_rewards(group_of(rewards, penalty=-0.5)), "a penalty for length is no reward"
