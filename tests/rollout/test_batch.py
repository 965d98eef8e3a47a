"""Samples as a batch: what is refused, and which weights drew them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.types import LOGPROB_SLACK, NOT_RECORDED, Batch, Group, Sample, VersionSpan, WeightVersion


def sample(*spans: VersionSpan, group: int = 41, **fields: Any) -> Sample:
    known: dict[str, Any] = {"response_ids": [10, 0], "loss_mask": [1, 1], "rollout_logprobs": [-0.2, -0.01], "reward": 1.0}
    return Sample("2+3=", [7, 1, 8, 2], group, weight_versions=list(spans), **(known | fields))


def batch(*samples: Sample) -> Batch:
    return Batch.from_groups([Group(41, list(samples))])


def test_the_worked_example_of_the_module():
    made = batch(
        sample(VersionSpan("ab12/0/3", 0, 2)),
        sample(
            VersionSpan("ab12/0/3", 0, 1), VersionSpan("ab12/0/4", 1, 2), response_ids=[6, 0], rollout_logprobs=[-2.0, -0.03], reward=0.0
        ),
    )
    assert made.tokens.tolist() == [7, 1, 8, 2, 10, 0, 7, 1, 8, 2, 6, 0] and made.cu_seqlens.tolist() == [0, 6, 12]
    assert made.loss_mask.tolist() == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    assert made.rollout_logprobs.tolist() == np.float32([0, 0, 0, 0, -0.2, -0.01, 0, 0, 0, 0, -2, -0.03]).tolist()
    assert (made.rewards.tolist(), made.group.tolist(), made.version.tolist()) == ([1.0, 0.0], [41, 41], [3, 3])


@pytest.mark.parametrize(
    ("spans", "version"),
    [
        ([("r/0/12", 0, 2)], 12),
        ([("r/0/12", 0, 1), ("r/0/9", 1, 2)], 9),
        ([("r/1/9", 0, 1), ("r/0/12", 1, 2)], 12),  # an epoch is older, whatever its numbers
        ([("r/0/3", 0, 0), ("r/0/4", 0, 2)], 4),  # these drew nothing
        ([("a/run/0/5", 0, 2)], 5),
        ([], -1),
    ],
)
def test_a_sample_is_as_old_as_the_oldest_weights_that_drew_a_token_of_it(spans: list[tuple[str, int, int]], version: int):
    made = batch(sample(*(VersionSpan(*s) for s in spans)))
    assert made.version.dtype == np.int64 and made.version.tolist() == [version]


def test_versions_follow_their_samples_to_disk_and_into_a_selection(tmp_path: Path):
    made = batch(*(sample(VersionSpan(f"r/0/{n}", 0, 2)) for n in (5, 6, 7)))
    made.save(tmp_path / "b.npz")
    assert Batch.load(tmp_path / "b.npz").version.tolist() == [5, 6, 7]
    assert made.select(np.array([2, 0])).version.tolist() == [7, 5]


@pytest.mark.parametrize(("tokens", "samples"), [(0, 1), (5, 1), (6, 1), (11, 1), (12, 2), (99, 3)])
def test_the_first_samples_of_so_many_tokens(tokens: int, samples: int):
    assert len(batch(sample(), sample(), sample()).first(tokens)) == samples


def test_groups_packed_one_by_one_make_the_batch_of_all():
    groups = [
        Group(
            3,
            [
                sample(VersionSpan("r/0/5", 0, 2), group=3),
                sample(group=3, response_ids=[6, 9, 0], loss_mask=[1, 0, 1], rollout_logprobs=[-1.0] * 3),
            ],
        ),
        Group(8, [sample(VersionSpan("r/0/6", 0, 2), group=8, reward=0.5)]),
    ]
    whole, joined = Batch.from_groups(groups), Batch.concatenate([Batch.from_groups([group]) for group in groups])
    assert whole.columns().keys() == joined.columns().keys()
    for name, expected in whole.columns().items():
        found = joined.columns()[name]
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("value", [math.nan, None, math.inf, -math.inf, 2 * LOGPROB_SLACK])
def test_what_is_no_log_prob_never_gets_into_a_batch(value: Any):
    says = rf"rollout\.generate: sample 0 of group 41 has {value!r} in rollout_logprobs at token 1 of 2; give the natural logarithm"
    with pytest.raises(ValueError, match=says):
        batch(sample(rollout_logprobs=[-0.2, value]))


def test_rounding_may_lift_a_log_prob_above_0():
    assert batch(sample(rollout_logprobs=[0.0, LOGPROB_SLACK / 2])).rollout_logprobs[-1] > 0


@pytest.mark.parametrize("mask", [[1, 2], [1, 0.5], [-1, 0], [None, 1]])
def test_a_mask_is_0_or_1(mask: list[Any]):
    with pytest.raises(ValueError, match=r"rollout\.generate: sample 0 of group 41 has .* in loss_mask; give 1 where"):
        batch(sample(loss_mask=mask))


def test_a_mask_of_bools_is_one():
    assert batch(sample(loss_mask=[True, False])).loss_mask.tolist()[-2:] == [True, False]


@pytest.mark.parametrize("label", ["default", "r/0/x", "3", ""])
def test_a_label_that_is_no_version(label: str):
    with pytest.raises(
        ValueError, match=rf"rollout\.generate: sample 0 of group 41: '{label}' is not a weight version run_id/epoch/number in"
    ):
        batch(sample(VersionSpan(label, 0, 2)))


def test_a_version_is_read_from_its_label():
    version = WeightVersion(2, 17, "ab/12")
    assert WeightVersion.parse(version.label) == version


def experts(tokens: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + 4 * tokens, dtype=np.int16).reshape(tokens, 2, 2)


def test_experts_are_a_column_with_holes_where_no_engine_named_any(tmp_path: Path):
    made = batch(sample(experts=experts(5)), sample(), sample(experts=experts(2, 50)))
    assert made.experts is not None and made.experts.shape == (18, 2, 2) and made.experts.dtype == np.int16
    np.testing.assert_array_equal(made.experts[:5], experts(5))
    np.testing.assert_array_equal(made.experts[12:14], experts(2, 50))
    assert (made.experts[5:12] == NOT_RECORDED).all() and (made.experts[14:] == NOT_RECORDED).all()
    made.save(tmp_path / "b.npz")
    again = Batch.load(tmp_path / "b.npz").experts
    assert again is not None and np.array_equal(again, made.experts)
    picked = made.select(np.array([2, 0])).experts
    assert picked is not None and np.array_equal(picked, np.concatenate([made.experts[12:], made.experts[:6]]))


def test_a_batch_without_experts_has_no_such_column(tmp_path: Path):
    made = batch(sample())
    made.save(tmp_path / "b.npz")
    assert made.experts is None and Batch.load(tmp_path / "b.npz").experts is None and made.select(np.array([0])).experts is None


def test_batches_with_and_without_experts_are_one():
    some, none = batch(sample(experts=experts(5))), batch(sample())
    both = Batch.concatenate([none, some, none]).experts
    assert both is not None and np.array_equal(both[6:11], experts(5)) and (both[11:] == NOT_RECORDED).all()
    assert Batch.concatenate([none, none]).experts is None


def test_experts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sample 0 of group 41 has the experts of 7 tokens but 6 tokens"):
        batch(sample(experts=experts(7)))
    with pytest.raises(ValueError, match=r"experts .* of several shapes \(2, 2\), \(4, 1\) a token"):
        batch(sample(experts=experts(5)), sample(experts=experts(5).reshape(5, 4, 1)))
