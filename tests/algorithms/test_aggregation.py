import numpy as np
import pytest

from slime.algorithms.aggregation import token_weights
from slime.types import Batch

AGGREGATIONS = ("token", "sequence", "constant")


def make_batch(masks: list[list[int]]) -> Batch:
    """A batch with these loss masks, one list a sample."""
    lengths = [len(m) for m in masks]
    total = sum(lengths)
    return Batch(
        tokens=np.zeros(total, np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        loss_mask=np.array([bool(x) for m in masks for x in m]),
        rollout_logprobs=np.zeros(total, np.float32),
        rewards=np.zeros(len(masks)),
        group=np.arange(len(masks)),
        version=np.zeros(len(masks), np.int64),
    )


MASKS = [[0, 1, 1, 1], [0, 0, 1], [0, 1, 0, 1, 1, 1], [0, 0]]  # the last has nothing to train on


def test_weights_of_a_worked_example():
    batch = make_batch(MASKS)
    mask = batch.loss_mask.astype(float)
    np.testing.assert_array_equal(token_weights(batch, "token", 10), mask / 8)
    expected = np.concatenate([np.array(m) / (3 * n) for m, n in zip(MASKS, [3, 1, 4, 1], strict=True)])
    np.testing.assert_allclose(token_weights(batch, "sequence", 10), expected, rtol=1e-15)
    np.testing.assert_array_equal(token_weights(batch, "constant", 10), mask / 40)


@pytest.mark.parametrize(("aggregation", "total"), [("token", 1.0), ("sequence", 1.0), ("constant", 8 / 40)])
def test_weights_sum_to_what_they_should(aggregation, total):
    weights = token_weights(make_batch(MASKS), aggregation, 10)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(), total, rtol=1e-14)


def test_each_is_the_mean_it_is_named_after():
    batch = make_batch(MASKS)
    losses = np.random.default_rng(0).normal(size=len(batch.tokens))
    spans = [slice(a, b) for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)]
    trained = [losses[s][batch.loss_mask[s]] for s in spans]
    expected = {
        "token": np.concatenate(trained).mean(),
        "sequence": np.mean([x.mean() for x in trained if len(x)]),
        "constant": sum(x.sum() for x in trained) / (len(trained) * 10),
    }
    for aggregation in AGGREGATIONS:
        got = (token_weights(batch, aggregation, 10) * losses).sum()
        np.testing.assert_allclose(got, expected[aggregation], rtol=1e-12, err_msg=aggregation)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_weigh_nothing_and_trained_ones_something(aggregation):
    batch = make_batch(MASKS)
    assert ((token_weights(batch, aggregation, 10) != 0) == batch.loss_mask).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_token_weighs_the_same_wherever_its_sample_stands(aggregation):
    batch, order = make_batch(MASKS), np.array([2, 0, 3, 1])
    weights = token_weights(batch, aggregation, 10)
    spans = [weights[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] for i in order]
    np.testing.assert_array_equal(token_weights(batch.select(order), aggregation, 10), np.concatenate(spans))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_train_on_weighs_nothing(aggregation):
    assert token_weights(make_batch([[0, 0], [0]]), aggregation, 10).tolist() == [0, 0, 0]
    assert token_weights(make_batch([]), aggregation, 10).tolist() == []


def test_every_option_changes_the_weights():
    batch = make_batch(MASKS)
    token, sequence, constant = (token_weights(batch, a, 10) for a in AGGREGATIONS)
    assert not np.array_equal(token, sequence) and not np.array_equal(token, constant)
    assert not np.array_equal(constant, token_weights(batch, "constant", 20))


def test_an_unknown_aggregation_names_the_knob():
    with pytest.raises(ValueError, match=r"algorithm\.aggregation='median': choose token, sequence or constant"):
        token_weights(make_batch(MASKS), "median", 10)
