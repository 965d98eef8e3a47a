from itertools import combinations

import pytest

from slime.rollout.evaluate import pass_at_k, scores, spread


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 1), (4, 1, 2), (5, 3, 2), (4, 4, 4), (6, 2, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int):
    answers = [i < c for i in range(n)]
    subsets = list(combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_scores():
    rewards = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert scores(rewards, 2) == {"accuracy": 0.25, "avg_at_k": 0.25, "pass_at_k": 0.5}
    assert scores([[1.0], [0.5]], 1) == {"accuracy": 0.75}


def test_a_reward_that_failed_is_left_out_and_is_no_zero():
    assert scores([[None, 1.0], [1.0, None], [None, None]], 2) == {"accuracy": 1.0, "avg_at_k": 1.0, "pass_at_k": 1.0}


def test_spread_takes_samples_from_all_over_the_set():
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 8) == [1, 2]
    assert spread([1, 2], 0) == []
