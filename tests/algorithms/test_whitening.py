"""Whitening, against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.whitening import whiten


def reference(values: list[float], mask: list[bool], centre: bool = True) -> list[float]:
    """Mean and unbiased variance in fractions, so without any rounding."""
    chosen = [Fraction(x) for x, m in zip(values, mask, strict=True) if m]
    mean = sum(chosen) / len(chosen) if chosen else Fraction(0)
    variance = sum((x - mean) ** 2 for x in chosen) / max(len(chosen) - 1, 1)
    scale = math.sqrt(variance + Fraction(1e-8))
    return [float(Fraction(x) - (mean if centre else 0)) / scale if m else 0.0 for x, m in zip(values, mask, strict=True)]


@pytest.mark.parametrize("centre", [True, False])
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), max_size=30))
def test_the_result_is_that_of_exact_arithmetic(centre, rows):
    values, mask = [x for x, _ in rows], [m for _, m in rows]
    got = whiten(np.array(values), np.array(mask, bool), centre=centre)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference(values, mask, centre), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("offset", [1e8, -1e8])
def test_values_far_from_zero_keep_their_spread(offset):
    """E[x^2] - mean^2, as peers compute it, has no correct digit here even in float64."""
    values = offset + np.random.default_rng(0).normal(size=500)
    mask = np.arange(500) % 3 > 0
    expected = np.array(reference(values.tolist(), mask.tolist()))
    np.testing.assert_allclose(whiten(values, mask), expected, rtol=1e-6, atol=1e-6)
    naive = (values[mask] ** 2).mean() - values[mask].mean() ** 2
    assert abs(naive - values[mask].var()) > 0.1


def test_many_copies_of_one_value_are_zero_and_not_nan():
    """E[x^2] - mean^2, as peers compute it in fp32, is negative for these, and its root NaN."""
    values = np.full(100_003, -10.3, np.float32)
    assert (whiten(values, np.ones(len(values), bool)) == 0).all()


def test_the_result_has_mean_zero_and_unbiased_deviation_one():
    mask = np.arange(1000) % 4 > 0
    chosen = whiten(3 * np.random.default_rng(1).normal(size=1000) - 7, mask)[mask]
    assert abs(chosen.mean()) < 1e-12 and abs(chosen.std(ddof=1) - 1) < 1e-8


def test_the_variance_is_unbiased():
    np.testing.assert_allclose(whiten(np.array([0.0, 1.0]), np.ones(2, bool)), [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-7)


def test_without_centring_signs_stay_and_only_the_scale_changes():
    values = np.array([1.0, 2.0, 6.0, 0.0])
    np.testing.assert_allclose(whiten(values, np.ones(4, bool), centre=False), values / math.sqrt(83 / 12), rtol=1e-8)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("centre", [True, False])
def test_masked_tokens_are_zero_and_have_no_influence(garbage, centre):
    values = np.random.default_rng(2).normal(size=20)
    mask = np.arange(20) % 5 != 0
    clean = whiten(values, mask, centre=centre)
    assert whiten(np.where(mask, values, garbage), mask, centre=centre).tolist() == clean.tolist()
    assert (clean[~mask] == 0).all() and (clean[mask] != 0).all()


def test_shifting_or_scaling_all_values_changes_nothing_but_the_sign():
    values, mask = np.random.default_rng(3).normal(size=50), np.ones(50, bool)
    np.testing.assert_allclose(whiten(5 * values + 9, mask), whiten(values, mask), rtol=1e-6)
    np.testing.assert_allclose(whiten(-5 * values + 9, mask), -whiten(values, mask), rtol=1e-6)


@pytest.mark.parametrize("x", [0.1, -7.3e5, 1e300])
def test_one_token_alone_is_zero(x):
    assert whiten(np.array([3.0, x]), np.array([False, True])).tolist() == [0, 0]


def test_equal_values_that_are_not_centred_come_out_large():
    np.testing.assert_allclose(whiten(np.full(3, 0.1), np.ones(3, bool), centre=False), 1e3, rtol=1e-12)


def test_a_batch_without_trainable_tokens_is_all_zero():
    assert whiten(np.array([1.0, np.nan]), np.zeros(2, bool)).tolist() == [0, 0]


def test_fp32_values_are_whitened_in_float64():
    values = (1e3 + 1e-2 * np.random.default_rng(0).normal(size=2000)).astype(np.float32)
    got = whiten(values, np.ones(2000, bool))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, reference(values.tolist(), [True] * 2000), rtol=1e-6, atol=1e-6)


def test_values_whose_squares_no_double_holds_are_not_taken_for_equal():
    with np.errstate(over="ignore"):
        got = whiten(np.array([1e200, -1e200, 3e200]), np.ones(3, bool))
    assert (got != 0).all()
