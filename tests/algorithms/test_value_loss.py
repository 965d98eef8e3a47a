"""The critic's loss, against its formula token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.algorithms.value_loss import clipped_value_loss

numbers = st.floats(-4, 4)
tokens = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12)


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return list(torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def reference(v: float, old: float, target: float, clip: float) -> tuple[float, float]:
    """(loss, its slope in v), without a half. The bound counts where it makes the loss larger, and then the loss does not move with v."""
    near = min(max(v, old - clip), old + clip)
    if (near - target) ** 2 > (v - target) ** 2 and near != v:
        return (near - target) ** 2, 0.0
    return (v - target) ** 2, 2 * (v - target)


@pytest.mark.parametrize("clip", [0.2, 1.0])
@settings(max_examples=50, deadline=None)
@given(tokens)
def test_the_loss_follows_the_formula(clip, tokens):
    values, old, returns = torch.tensor(tokens, dtype=torch.float64).T
    loss, _ = clipped_value_loss(values, old, returns, clip)
    np.testing.assert_allclose(loss.tolist(), [reference(*row, clip)[0] for row in tokens], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_gradients_agree_with_the_formula_and_with_finite_differences(clip):
    values, old, returns = noise(200)
    values.requires_grad_()
    loss, held = clipped_value_loss(values, old, returns, clip)
    (slopes,) = torch.autograd.grad(loss.sum(), values)
    rows = zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
    expected = [reference(*row, clip)[1] for row in rows]
    np.testing.assert_allclose(slopes.tolist(), expected, rtol=1e-9)
    assert 20 < sum(slope == 0 for slope in expected) < 180
    assert all(held[t] == 1 for t, slope in enumerate(expected) if slope == 0)
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, clip)[0], values)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_value_beyond_the_bound_is_held_only_while_it_moves_towards_the_return(direction):
    values = (direction * torch.tensor([1.0, -1.0], dtype=torch.float64)).requires_grad_()
    returns = direction * torch.tensor([3.0, 3.0], dtype=torch.float64)
    loss, held = clipped_value_loss(values, torch.zeros(2, dtype=torch.float64), returns, 0.5)
    assert loss.tolist() == [2.5**2, 4.0**2] and held.tolist() == [1, 0]
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [0, direction * -8]


def test_there_is_no_half():
    loss, _ = clipped_value_loss(torch.tensor([3.0]), torch.tensor([3.0]), torch.tensor([1.0]), 0.2)
    assert loss.item() == 4


def test_without_a_bound_it_is_the_squared_error():
    values, old, returns = noise(20)
    loss, held = clipped_value_loss(values.requires_grad_(), old, returns, None)
    rows = zip(values.tolist(), returns.tolist(), strict=True)
    np.testing.assert_allclose(loss.tolist(), [(v - r) ** 2 for v, r in rows], rtol=1e-12)
    assert held.tolist() == [0] * 20
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, None)[0], values)
    assert torch.equal(torch.autograd.grad(loss.sum(), values)[0], 2 * (values - returns).detach())


@pytest.mark.parametrize("clip", [0.0, 0.2, None])
def test_before_the_first_update_no_bound_is_felt(clip):
    values, _, returns = noise(20)
    loss, held = clipped_value_loss(values.requires_grad_(), values.detach(), returns, clip)
    assert held.sum() == 0
    assert torch.equal(torch.autograd.grad(loss.sum(), values)[0], 2 * (values - returns).detach())


@pytest.mark.parametrize("clip", [0.2, None])
def test_what_is_reported_carries_no_gradient(clip):
    values, old, returns = noise(4, dtype=torch.float32)
    held = clipped_value_loss(values.requires_grad_(), old, returns, clip)[1]
    assert held.shape == (4,) and held.dtype == torch.float32 and not held.requires_grad


def test_a_value_within_the_bound_is_not_held():
    values, old, returns = noise(1000, dtype=torch.float32)
    _, held = clipped_value_loss(0.01 * values, 0.01 * old, returns, 0.2)
    assert held.sum() == 0
