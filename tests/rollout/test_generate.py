"""What a generate function keeps of the engines' answers."""

import numpy as np
import pytest

from slime.rollout.generate import append_answer, append_observation
from slime.types import Batch, Group, Sample
from tests.rollout.answers import answer


def experts(tokens: int, value: int) -> np.ndarray:
    return np.full((tokens, 2, 2), value, np.int16)


def test_what_was_said_first_of_a_token_s_experts_is_kept() -> None:
    """Four prompt tokens, an answer of three, an observation of two, an answer of two: the second answer tells of all tokens before."""
    sample = Sample("p", [7, 1, 8, 2], 41)
    append_answer(sample, answer([5, 6, 7], experts=experts(6, 1)))
    append_observation(sample, [9, 9], "tool")
    append_answer(sample, answer([3, 0], experts=experts(10, 2)))
    assert sample.experts is not None
    np.testing.assert_array_equal(sample.experts, np.concatenate([experts(6, 1), experts(4, 2)]))
    sample.reward = 0.0
    column = Batch.from_groups([Group(41, [sample])]).experts
    assert column is not None and column[:, 0, 0].tolist() == [1] * 6 + [2] * 4 + [-1]


def test_an_answer_to_another_text_tells_no_experts() -> None:
    """Four prompt tokens, of which the engine was shown two: its rows would stand at the wrong tokens."""
    sample = Sample("p", [7, 1, 8, 2], 41)
    with pytest.raises(ValueError, match=r"^an answer to 2 tokens is added to a sample of 4, .*prompt_ids \+ response_ids, or set rollout"):
        append_answer(sample, answer([5, 6, 7], experts=experts(4, 1)))
    assert sample.response_ids == [] and sample.experts is None


def test_answers_without_experts_leave_a_sample_without() -> None:
    sample = Sample("p", [7, 1], 41)
    append_answer(sample, answer([5, 6]))
    assert sample.experts is None
