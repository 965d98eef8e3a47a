"""The built-in rewards: functions of a sample, 1.0 for a right answer and 0.0 for a wrong one.

They raise ValueError where the label is missing or cannot be used, which is an error of the data and no zero.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from slime.config import RewardConfig
from slime.types import Prompt, Sample

COMPARE = ("exact", "numeric", "math")
NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
LATEX = ("$", "\\boxed", "\\(", "\\[")  # what marks mathematics in a text
TOLERANCE = 1e-6  # relative; and absolute, for labels near zero


def builtin(cfg: RewardConfig) -> Callable[[Sample], float] | None:
    """The built-in reward of this name, None where the name is not one."""
    if cfg.fn == "format":
        assert cfg.pattern is not None, "reward.fn=format without reward.pattern"
        return format_of(cfg.pattern)
    return {"exact": exact, "numeric": numeric, "math": math_equal}.get(cfg.fn)


def check_label(cfg: RewardConfig, fn: str | None, prompt: Prompt) -> None:
    """Raises ValueError for a prompt without the label that its reward compares with; `fn` is an evaluation set's own reward."""
    chosen = fn or (None if cfg.url else cfg.fn)
    if chosen in COMPARE and prompt.label is None:
        raise ValueError(
            f"the first row of {prompt.source} has no label, which reward.fn={chosen} compares with: set data.label_key or reward.fn"
        )


def exact(sample: Sample) -> float:
    """The answer is the label, but for white space around them."""
    return float(sample.text.strip() == str(label_of(sample, "exact")).strip())


def numeric(sample: Sample) -> float:
    """The last number of the answer is the last number of the label, within a relative 1e-6. Thousands commas are allowed."""
    label = label_of(sample, "numeric")
    expected = last_number(str(label))
    if expected is None:
        raise ValueError(f"reward.fn=numeric: the label {label!r} has no number; set data.label_key")
    found = last_number(sample.text)
    return float(found is not None and math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE))


def math_equal(sample: Sample) -> float:
    """The answer is mathematically equal to the label, by math-verify; LaTeX, boxed or not, on both sides.

    math-verify's own time limit is a signal, which works in a main thread only; it is off. The worker that runs this is killed instead.
    """
    from math_verify import parse, verify

    label = str(label_of(sample, "math"))
    latex = label if any(mark in label for mark in LATEX) else f"${label}$"  # bare, 2\sqrt{2} would be read as 2
    expected = parse(latex, parsing_timeout=None)
    if not expected:
        raise ValueError(f"reward.fn=math: math-verify finds nothing to compare in the label {label!r}; set data.label_key")
    return float(verify(expected, parse(sample.text, parsing_timeout=None), timeout_seconds=None))


def format_of(pattern: str) -> Callable[[Sample], float]:
    """A reward for answers in which the regular expression is found; a dot matches line ends too, ^ and $ the whole answer's ends."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(sample: Sample) -> float:
        return float(compiled.search(sample.text) is not None)

    return matches


def label_of(sample: Sample, name: str) -> Any:
    if sample.label is None:
        raise ValueError(f"reward.fn={name} compares with a label, and the row of prompt {sample.group} has none; set data.label_key")
    return sample.label


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
