"""The built-in rewards: functions of a sample, 1.0 for a right answer and 0.0 for a wrong one.

They raise ValueError where the label is missing or cannot be used, which is an error of the data and no zero.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from slime.config import RewardConfig
from slime.types import Prompt, Sample

COMPARE = ("exact", "numeric", "math")
NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")  # 1,234 but not 1,5
LATEX = ("$", "\\boxed", "\\(", "\\[")  # what marks mathematics in a text
TOLERANCE = 1e-6  # relative; and absolute, for labels near zero


def builtin(cfg: RewardConfig, knob: str) -> Callable[[Sample], float] | None:
    """The built-in reward of this name, None where the name is not one. Its errors name `knob`, where the recipe names it."""
    if cfg.fn == "format":
        assert cfg.pattern is not None, "reward.fn=format without reward.pattern"
        return format_of(cfg.pattern)
    named = {"exact": exact, "numeric": numeric, "math": math_equal}.get(cfg.fn)
    return None if named is None else partial(named, name=f"{knob}={cfg.fn}")


def check_label(cfg: RewardConfig, fn: str | None, prompt: Prompt, knob: str = "reward.fn") -> None:
    """Raises ValueError for a prompt without the label that its reward compares with.

    `fn` is an evaluation set's own reward, and `knob` the one that sets it, data.eval.<name>.reward.
    """
    chosen = fn or (None if cfg.url else cfg.fn)
    if chosen in COMPARE and prompt.label is None:
        raise ValueError(
            f"the first row of {prompt.source} has no label, which {knob if fn else 'reward.fn'}={chosen} compares with: "
            f"set data.label_key or {knob}"
        )


def exact(sample: Sample, name: str) -> float:
    """The answer is the label, but for white space around them."""
    return float(sample.text.strip() == str(label_of(sample, name)).strip())


def numeric(sample: Sample, name: str) -> float:
    """The last number of the answer is the last number of the label, within a relative 1e-6. 1,234 is one number, 1,5 are two."""
    label = label_of(sample, name)
    expected = last_number(str(label))
    if expected is None:
        raise ValueError(f"{name}: the label {label!r} has no number; set data.label_key")
    found = last_number(sample.text)
    return float(found is not None and math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE))


def math_equal(sample: Sample, name: str) -> float:
    """The answer is mathematically equal to the label, by math-verify; LaTeX, boxed or not, on both sides.

    math-verify's own time limit is a signal, which works in a main thread only; it is off. The worker that runs this is killed instead.
    """
    from math_verify import parse, verify

    label = str(label_of(sample, name))
    latex = label if any(mark in label for mark in LATEX) else f"${label}$"  # bare, 2\sqrt{2} would be read as 2
    expected = parse(latex, parsing_timeout=None)
    if not expected:
        raise ValueError(f"{name}: math-verify finds nothing to compare in the label {label!r}; set data.label_key")
    return float(verify(expected, parse(sample.text, parsing_timeout=None), timeout_seconds=None))


def format_of(pattern: str) -> Callable[[Sample], float]:
    """A reward for answers in which the regular expression is found; a dot matches line ends too, ^ and $ the whole answer's ends."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(sample: Sample) -> float:
        return float(compiled.search(sample.text) is not None)

    return matches


def label_of(sample: Sample, name: str) -> Any:
    if sample.label is None:
        raise ValueError(f"{name} compares with a label, and the row of prompt {sample.group} has none; set data.label_key")
    return sample.label


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
