"""Curves as inline SVG: lines over steps, stacked times. Colours and fonts come from the page's style (c0 to c5).

A chart carries its data in a `data-` attribute for the pointer's read-out (`page.SCRIPT`); without script it is a picture.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from slime.observe.console_table import short

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24  # around the plot
MAX_POINTS = 300  # more steps are drawn as means of equal stretches


@dataclass(frozen=True, slots=True)
class Frame:
    """The size of a picture, in units that are about a pixel on the page."""

    width: int
    height: int

    def x(self, first: int, last: int) -> Callable[[float], float]:
        """Where a step lies."""
        width = self.width - LEFT - RIGHT
        return lambda step: LEFT + width * ((step - first) / (last - first) if last > first else 0.5)

    def y(self, axis: "Axis") -> Callable[[float], float]:
        """Where a value lies."""
        return lambda value: self.height - BOTTOM - (self.height - TOP - BOTTOM) * axis(value)


SMALL, LARGE = Frame(370, 175), Frame(580, 230)


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
    if size >= 100:
        return f"{value:.0f}" if size < 10_000 else short(value)
    if size == 0 or size >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.3g}%"


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
        if high - low <= 1e-9 * abs(high):  # a flat line: above its floor, or in the middle
            low, high = low if bounds[0] == low else low - (abs(low) / 2 or 1.0), high + (abs(high) / 2 or 1.0)
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
    frame: Frame = SMALL,
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
    x, y = frame.x(first, last), frame.y(axis)
    parts = [_grid(axis, write, y, frame), _step_axis(first, last, x, frame)]
    if threshold and 0 <= axis(threshold) <= 1:
        parts.append(f'<path class="limit" d="M{LEFT} {y(threshold):.1f}H{frame.width - RIGHT}"/>')
    for i, s in enumerate(drawn):
        points = [(x(step), None if v is None else y(v)) for step, v in zip(s.steps, s.values, strict=True)]
        parts.append(_line(points, i, s.markers))
    return _svg(parts, drawn, x, write, frame)


def stacked_chart(series: Sequence[Series], frame: Frame = SMALL, *, write: Callable[[float], str] = number) -> str:
    """Areas on top of one another; a missing value counts as 0. All series have the same steps."""
    drawn = [s.thinned() for s in series]
    heights = [[v or 0.0 for v in s.values] for s in drawn]
    totals = [sum(column) for column in zip(*heights, strict=True)]
    first, last = _span(series)
    axis = Axis.around(totals, log=False, bounds=(0.0, None))
    x, y = frame.x(first, last), frame.y(axis)
    parts = [_grid(axis, write, y, frame), _step_axis(first, last, x, frame)]
    floor = [0.0] * len(totals)
    half = (x(last) - x(first)) / max(1, len(totals) - 1) / 2 if last > first else 40.0
    columns = [(max(LEFT, x(s) - half), min(frame.width - RIGHT, x(s) + half)) for s in drawn[0].steps]
    for i, height in enumerate(heights):
        top = [f + h for f, h in zip(floor, height, strict=True)]
        outline = [*_outline(columns, top, y), *reversed(_outline(columns, floor, y))]
        parts.append(f'<path class="area c{i}" d="M{"L".join(outline)}Z"/>')
        floor = top
    return _svg(parts, drawn, x, write, frame)


def _outline(columns: Sequence[tuple[float, float]], values: Sequence[float], y: Callable[[float], float]) -> list[str]:
    """The upper edge of bars that touch, from left to right."""
    return [f"{at:.1f} {y(v):.1f}" for edges, v in zip(columns, values, strict=True) for at in edges]


def _positive(series: Series) -> Series:
    return Series(series.name, series.steps, [v if v is not None and v > 0 else None for v in series.values], series.markers)


def _span(series: Sequence[Series]) -> tuple[int, int]:
    steps = [step for s in series for step in s.steps]
    return min(steps), max(steps)


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


def _grid(axis: Axis, write: Callable[[float], str], y: Callable[[float], float], frame: Frame) -> str:
    out = []
    for value in axis.ticks():
        at = y(value)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{frame.width - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(write(value))}</text>')
    return "".join(out)


def _step_axis(first: int, last: int, x: Callable[[float], float], frame: Frame) -> str:
    """Whole steps."""
    values = sorted({round(v) for v in ticks(first, last, 5)}) if last > first else [first]
    return "".join(f'<text class="tick" x="{x(v):.1f}" y="{frame.height - 7}" text-anchor="middle">{short(v)}</text>' for v in values)


def _svg(parts: list[str], drawn: Sequence[Series], x: Callable[[float], float], write: Callable[[float], str], frame: Frame) -> str:
    """The picture with what the read-out needs: for every step its x and each series' text."""
    by_step: dict[int, list[str]] = {}
    for i, s in enumerate(drawn):
        for step, value in zip(s.steps, s.values, strict=True):
            row = by_step.setdefault(step, [""] * len(drawn))
            row[i] = "" if value is None else write(value)
    rows = [[round(x(step), 1), step, *texts] for step, texts in sorted(by_step.items())]
    data = json.dumps({"names": [s.name for s in drawn], "rows": rows}, separators=(",", ":"))
    data = escape(data, quote=False).replace("'", "&#39;")
    cursor = f'<path class="cursor" d="M0 {TOP}V{frame.height - BOTTOM}"/>'
    size = f'viewBox="0 0 {frame.width} {frame.height}"'
    return f"""<svg class="chart" {size} role="img" data-chart='{data}'>{"".join(parts)}{cursor}</svg>"""
