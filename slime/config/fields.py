"""How a knob states which values it takes."""

from dataclasses import field
from typing import Any


def choice(*values: str) -> Any:
    """A string knob with a closed set of values, the first of which is the default."""
    return field(default=values[0], metadata={"choices": values})


def number(
    default: Any, *, low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A numeric knob with bounds: low <= x <= high, above < x < below."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "below": below})
