"""Overlong answers against DAPO's formulas (arXiv 2503.14476, section 3.4), written from the paper in fractions."""

from fractions import Fraction

import pytest

from slime.config import SlimeConfig
from slime.rollout.filters import mixed_rewards
from slime.rollout.shaping import overlong_penalty, shape, teaches
from slime.types import Batch, Group, Sample


def eq_13(length: int, longest: int, cache: int) -> Fraction:
    """R_length(y), case by case."""
    if length <= longest - cache:
        return Fraction(0)
    if length <= longest:
        return Fraction((longest - cache) - length, cache)
    return Fraction(-1)


@pytest.mark.parametrize(("longest", "buffer", "penalty"), [(20, 4, 1.0), (20, 20, 1.0), (7, 1, 0.5), (100, 30, 3.0)])
def test_the_penalty_is_that_of_the_paper(longest: int, buffer: int, penalty: float):
    for length in range(1, longest + 3):
        assert overlong_penalty(length, longest, buffer, penalty) == pytest.approx(
            float(eq_13(length, longest, buffer) * Fraction(penalty))
        )


def test_the_papers_own_numbers():
    """Expected 16384 tokens, 4096 more as a buffer."""
    found = [overlong_penalty(n, 20480, 4096, 1.0) for n in (16384, 17408, 18432, 20480, 30000)]
    assert found == [0.0, -0.25, -0.5, -1.0, -1.0] and str(found[0]) == "0.0"


def group_of(*answers: tuple[float, int, str]) -> Group:
    """Of (reward, length, finish reason)."""
    made = [
        Sample("p", [1], 5, i, response_ids=[2] * n, loss_mask=[1] * n, rollout_logprobs=[-0.5] * n, reward=reward, finish_reason=why)
        for i, (reward, n, why) in enumerate(answers)
    ]
    return Group(5, made)


def recipe(buffer: int = 0, mask_truncated: bool = False) -> SlimeConfig:
    cfg = SlimeConfig()
    cfg.rollout.max_response_tokens, cfg.reward.overlong_buffer, cfg.reward.overlong_penalty = 10, buffer, 0.5
    cfg.rollout.mask_truncated = mask_truncated
    return cfg


def test_the_batch_has_penalties_and_the_samples_keep_their_rewards():
    group = shape(group_of((1.0, 6, "stop"), (1.0, 8, "stop"), (0.0, 10, "length")), recipe(buffer=4))
    assert group.rewards == [1.0, 1.0, 0.0] and [s.penalty for s in group.samples] == [0.0, -0.25, -0.5]
    batch = Batch.from_groups([group])
    assert batch.rewards.tolist() == [1.0, 0.75, -0.5] and batch.trained_lengths.tolist() == [6, 8, 10]


def test_a_filter_sees_rewards_without_penalties():
    """DAPO's dynamic sampling asks for groups with a right and a wrong answer (eq. 11); lengths alone do not make one."""
    group = shape(group_of((1.0, 6, "stop"), (1.0, 10, "stop")), recipe(buffer=4))
    assert group.trained_rewards == [1.0, 0.5] and not mixed_rewards(group)


def test_a_truncated_answer_is_not_trained_on_and_counts_in_its_group():
    group = shape(group_of((1.0, 3, "stop"), (0.0, 10, "length"), (0.5, 10, "stop")), recipe(mask_truncated=True))
    batch = Batch.from_groups([group])
    assert batch.trained_lengths.tolist() == [3, 0, 10] and batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert batch.group.tolist() == [5, 5, 5] and not batch.rollout_logprobs[4:15].any()
    assert [s.penalty for s in group.samples] == [None] * 3 and teaches(group)


def test_without_the_knobs_nothing_changes():
    answers = ((1.0, 3, "stop"), (0.0, 10, "length"))
    assert shape(group_of(*answers), recipe()) == group_of(*answers)


def test_a_group_that_was_cut_off_as_a_whole_teaches_nothing():
    assert not teaches(shape(group_of((1.0, 10, "length"), (0.0, 10, "length")), recipe(mask_truncated=True)))
