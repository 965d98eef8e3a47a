"""The built-in rewards as plain functions."""

import threading
from typing import Any

import pytest

from slime.config import RewardConfig
from slime.rollout.rewards.builtin import builtin, check_label
from slime.types import Prompt, Sample


def reward(fn: str, text: str, label: Any = None, **cfg) -> float:
    function = builtin(RewardConfig(fn=fn, **cfg), "reward.fn")
    assert function is not None
    return function(Sample("p", [1], 7, label=label, text=text))


@pytest.mark.parametrize(("text", "label", "expected"), [(" 42\n", "42", 1.0), ("42", 42, 1.0), ("42.0", "42", 0.0), ("", "42", 0.0)])
def test_exact(text: str, label: Any, expected: float):
    assert reward("exact", text, label) == expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("so it is 1,234.50", "1234.5", 1.0),
        ("10-7 is 3.", 3, 1.0),
        ("5 = -2 + 7", "... #### 7", 1.0),
        ("x = -7", "-7", 1.0),
        ("10-7", "7", 1.0),
        ("3, 4", "4", 1.0),
        ("(1,5)", "5", 1.0),
        ("(1,5)", "15", 0.0),
        ("1,23,456", "23456", 1.0),
        ("1234,567", "567", 1.0),
        ("1,2345", "2345", 1.0),
        ("-1,234,567.5 in all", "-1234567.5", 1.0),
        ("1e3", "1000", 1.0),
        ("about .5", "0.5", 1.0),
        ("41", "42", 0.0),
        ("nothing", "42", 0.0),
    ],
)
def test_numeric(text: str, label: Any, expected: float):
    assert reward("numeric", text, label) == expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        (r"thus \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"thus $x = \sqrt{8}$", r"2\sqrt{2}", 1.0),
        (r"\boxed{7}", "7", 1.0),
        (r"\boxed{7}", "the answer is $7$", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{2}", r"2\sqrt{2}", 0.0),
        (r"\boxed{3}", "4", 0.0),
        ("no idea", "4", 0.0),
    ],
)
def test_math(text: str, label: str, expected: float):
    assert reward("math", text, label) == expected


def test_math_works_outside_the_main_thread():
    """math-verify's own time limit, a signal, would fail there and make every reward zero."""
    got: list[float] = []
    thread = threading.Thread(target=lambda: got.append(reward("math", r"\boxed{4}", "4")))
    thread.start()
    thread.join()
    assert got == [1.0]


def test_format():
    assert reward("format", "<think>a\nb</think>3", pattern=r"^<think>.*</think>\d$") == 1.0
    assert reward("format", "<think>a", pattern=r"^<think>.*</think>\d$") == 0.0


@pytest.mark.parametrize("fn", ["exact", "numeric", "math"])
def test_a_missing_label_is_an_error_and_no_zero(fn: str):
    with pytest.raises(ValueError, match=rf"reward\.fn={fn} compares with a label.*prompt 7 has none; set data\.label_key"):
        reward(fn, "4")


def test_a_missing_label_is_found_before_anything_starts():
    without, with_label = Prompt(0, "p", source="s"), Prompt(0, "p", label="1", source="s")
    with pytest.raises(ValueError, match=r"the first row of s has no label, which reward\.fn=exact compares with: set data\.label_key"):
        check_label(RewardConfig(), None, without)
    with pytest.raises(ValueError, match=r"reward\.fn=numeric"):
        check_label(RewardConfig(url="http://x"), "numeric", without)
    knob = "data.eval.aime.reward"
    with pytest.raises(
        ValueError, match=r"which data\.eval\.aime\.reward=math compares with: set data\.label_key or data\.eval\.aime\.reward"
    ):
        check_label(RewardConfig(fn="format"), "math", without, knob)
    with pytest.raises(ValueError, match=r"which reward\.fn=exact compares with: set data\.label_key or data\.eval\.aime\.reward"):
        check_label(RewardConfig(), None, without, knob)
    check_label(RewardConfig(), None, with_label)
    check_label(RewardConfig(url="http://x"), None, without)
    check_label(RewardConfig(fn="format"), None, without)


def test_errors_name_the_knob_of_an_evaluation_set():
    function = builtin(RewardConfig(fn="numeric"), "data.eval.aime.reward")
    assert function is not None
    with pytest.raises(ValueError, match=r"^data\.eval\.aime\.reward=numeric compares with a label"):
        function(Sample("p", [1], 7, text="4"))
    with pytest.raises(ValueError, match=r"^data\.eval\.aime\.reward=numeric: the label 'none' has no number"):
        function(Sample("p", [1], 7, label="none", text="4"))


def test_a_label_that_cannot_be_compared_with():
    with pytest.raises(ValueError, match="the label 'none' has no number"):
        reward("numeric", "4", "none")
    with pytest.raises(ValueError, match="math-verify finds nothing to compare in the label ''"):
        reward("math", "4", "")
