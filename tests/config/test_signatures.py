"""Calls that slime makes, against signatures of users' functions."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from slime.config.check_signatures import FILTER, GENERATE, REWARDS, always_true, is_async, refusal
from slime.config.fields import choice
from slime.config.reward import RewardConfig


class Unreadable:
    """A callable whose signature Python does not give."""

    __signature__ = "none"

    def __call__(self, *given: Any) -> bool:
        return True


class Group:
    async def __call__(self, group: Any) -> bool:
        return True

    def method(self, group: Any) -> bool:
        return True


def test_every_reward_signature_has_its_call() -> None:
    assert tuple(REWARDS) == RewardConfig.__dataclass_fields__["signature"].metadata["choices"]
    assert choice(*REWARDS).default == RewardConfig().signature


@pytest.mark.parametrize(
    "fn",
    [max, bool, lambda *given: True, functools.partial(lambda a, group: True, 1), Group().method, Unreadable(), lambda group, more=1: True],
)
def test_what_takes_a_group(fn: Callable[..., Any]) -> None:
    assert refusal(fn, FILTER) is None


@pytest.mark.parametrize("fn", [lambda: True, lambda a, b: True, lambda *, group: True, Group.method])
def test_what_does_not(fn: Callable[..., Any]) -> None:
    assert refusal(fn, FILTER) is not None


def test_verls_is_called_by_name() -> None:
    assert refusal(lambda solution_str, **rest: 1, REWARDS["verl"]) is None
    assert refusal(lambda solution_str, ground_truth: 1, REWARDS["verl"]) == "got an unexpected keyword argument 'data_source'"
    assert refusal(lambda s, c, cfg: 1, GENERATE) is None


def test_asynchronous_callables() -> None:
    assert is_async(Group()) and always_true(Group()) == "a coroutine"
    assert is_async(functools.partial(Group().__call__, 1)) and not is_async(max)
    assert always_true(Group().method) is None
