"""Curves as inline SVG: lines over steps, stacked times. Colours and fonts come from the page's style (c0 to c5).

A chart carries its data in a `data-` attribute for the pointer's read-out (`page.SCRIPT`); without script it is a picture.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from slime.observe.console_table import short

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 300  # more steps are drawn as means of equal stretches


@dataclass(frozen=True, slots=True)
class Series:
    """Values by step; None where there is none (the line is broken there)."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    markers: bool = False  # dots joined by a line, for values that are not there at every step

    def thinned(self) -> "Series":
        """At most MAX_POINTS points: means of equal stretches, placed at their last step."""
        n = len(self.steps)
        size = math.ceil(n / MAX_POINTS)
        if size <= 1:
            return self
        cuts = [range(i, min(i + size, n)) for i in range(0, n, size)]
        return Series(self.name, [self.steps[c[-1]] for c in cuts], [_mean([self.values[i] for i in c]) for c in cuts], self.markers)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def number(value: float) -> str:
    """A value in a few characters."""
    size = abs(value)
    if size >= 10_000:
        return short(value)
    if size == 0 or size >= 0.01:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) within low..high."""
    span = high - low
    assert span > 0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Axis:
    """A value axis: where a value lies between the bottom (0) and the top (1) of the plot."""

    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool, bounds: tuple[float | None, float | None]) -> "Axis":
        """An axis that shows all values and, where given, the bounds."""
        if log:
            exponents = [math.log10(v) for v in values]
            return cls(math.floor(min(exponents) - 0.05), math.ceil(max(exponents) + 0.05), True)
        low = min([*values, *(b for b in bounds if b is not None)])
        high = max([*values, *(b for b in bounds if b is not None)])
        if high - low < 1e-9 * max(1.0, abs(high)) or high == low:
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        pad = 0.06 * (high - low)
        return cls(low if bounds[0] == low else low - pad, high if bounds[1] == high else high + pad, False)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return (at - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high)
        stride = max(1, round((self.high - self.low) / 4))
        return [10.0**e for e in range(int(self.low), int(self.high) + 1, stride)]


def line_chart(
    series: Sequence[Series],
    *,
    log: bool = False,
    bounds: tuple[float | None, float | None] = (None, None),
    write: Callable[[float], str] = number,
    threshold: float | None = None,
) -> str:
    """Lines over steps, at least one value in all. `log` drops values <= 0; `threshold` is drawn as a dashed line where in view."""
    drawn = [_positive(s.thinned()) if log else s.thinned() for s in series]
    axis = Axis.around([v for s in drawn for v in s.values if v is not None], log=log, bounds=bounds)
    first, last = _span(series)
    x, y = _scale_x(first, last), _scale_y(axis)
    parts = [_grid(axis, write, y), _step_axis(first, last, x)]
    if threshold and 0 <= axis(threshold) <= 1:
        parts.append(f'<path class="limit" d="M{LEFT} {y(threshold):.1f}H{WIDTH - RIGHT}"/>')
    for i, s in enumerate(drawn):
        points = [(x(step), None if v is None else y(v)) for step, v in zip(s.steps, s.values, strict=True)]
        parts.append(_line(points, i, s.markers))
    return _svg(parts, drawn, x, write)


def stacked_chart(series: Sequence[Series], write: Callable[[float], str] = number) -> str:
    """Areas on top of one another; a missing value counts as 0. All series have the same steps."""
    drawn = [s.thinned() for s in series]
    heights = [[v or 0.0 for v in s.values] for s in drawn]
    totals = [sum(column) for column in zip(*heights, strict=True)]
    first, last = _span(series)
    axis = Axis.around(totals, log=False, bounds=(0.0, None))
    x, y = _scale_x(first, last), _scale_y(axis)
    parts = [_grid(axis, write, y), _step_axis(first, last, x)]
    floor = [0.0] * len(totals)
    half = (x(last) - x(first)) / max(1, len(totals) - 1) / 2 if last > first else 40.0
    for i, (s, height) in enumerate(zip(drawn, heights, strict=True)):
        top = [f + h for f, h in zip(floor, height, strict=True)]
        outline = _steps(s.steps, top, x, y, half) + _steps(s.steps, floor, x, y, half)[::-1]
        parts.append(f'<path class="area c{i}" d="M{"L".join(outline)}Z"/>')
        floor = top
    return _svg(parts, drawn, x, write)


def _steps(
    steps: Sequence[int], values: Sequence[float], x: Callable[[float], float], y: Callable[[float], float], half: float
) -> list[str]:
    """The outline of bars that touch, within the plot."""
    edges = ((max(LEFT, x(s) - half), min(WIDTH - RIGHT, x(s) + half), y(v)) for s, v in zip(steps, values, strict=True))
    return [f"{at:.1f} {height:.1f}" for left, right, height in edges for at in (left, right)]


def _positive(series: Series) -> Series:
    return Series(series.name, series.steps, [v if v is not None and v > 0 else None for v in series.values], series.markers)


def _span(series: Sequence[Series]) -> tuple[int, int]:
    steps = [step for s in series for step in s.steps]
    return min(steps), max(steps)


def _scale_x(first: int, last: int) -> Callable[[float], float]:
    width = WIDTH - LEFT - RIGHT
    return lambda step: LEFT + width * ((step - first) / (last - first) if last > first else 0.5)


def _scale_y(axis: Axis) -> Callable[[float], float]:
    return lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis(value)


def _line(points: list[tuple[float, float | None]], colour: int, markers: bool) -> str:
    """A path through the points that have a value, broken where one has none; a lone point is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for at, height in points:
        if height is None:
            runs.append([])
        else:
            runs[-1].append((at, height))
    path = "".join("M" + "L".join(f"{a:.1f} {h:.1f}" for a, h in run) for run in runs if len(run) > 1)
    dots = [p for run in runs for p in run if markers or len(run) == 1]
    circles = "".join(f'<circle class="dot c{colour}" cx="{a:.1f}" cy="{h:.1f}" r="2.6"/>' for a, h in dots)
    return (f'<path class="line c{colour}" d="{path}"/>' if path else "") + circles


def _grid(axis: Axis, write: Callable[[float], str], y: Callable[[float], float]) -> str:
    out = []
    for value in axis.ticks():
        at = y(value)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(write(value))}</text>')
    return "".join(out)


def _step_axis(first: int, last: int, x: Callable[[float], float]) -> str:
    """Whole steps; labels too near to the right edge end there."""
    values = sorted({round(v) for v in ticks(first, last, 5)}) if last > first else [first]
    labels = (
        f'<text class="tick" x="{min(x(v), WIDTH - RIGHT - 3 * len(short(v))):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{short(v)}</text>'
        for v in values
    )
    return "".join(labels)


def _svg(parts: list[str], drawn: Sequence[Series], x: Callable[[float], float], write: Callable[[float], str]) -> str:
    """The picture with what the read-out needs: for every step its x and each series' text."""
    by_step: dict[int, list[str]] = {}
    for i, s in enumerate(drawn):
        for step, value in zip(s.steps, s.values, strict=True):
            row = by_step.setdefault(step, [""] * len(drawn))
            row[i] = "" if value is None else write(value)
    rows = [[round(x(step), 1), step, *texts] for step, texts in sorted(by_step.items())]
    data = escape(json.dumps({"names": [s.name for s in drawn], "rows": rows}, separators=(",", ":")), quote=False).replace("'", "&#39;")
    cursor = f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>'
    body = "".join(parts)
    return f"""<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-chart='{data}'>{body}{cursor}</svg>"""
