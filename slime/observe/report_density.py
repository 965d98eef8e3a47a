"""Where the weights changed, as two heat maps: layers by kinds of tensors in the newest version, and layers by versions.

The colour is the share of changed elements on a log scale: h0 to h15 of the page's style, h-none where nothing changed. Both maps have
the same rows at the same heights. What the pointer reads stands in the `data-heat` attribute; without script a map is a picture.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

import numpy as np

from slime.observe.charts import percent, ticks
from slime.observe.console_table import short
from slime.observe.density import Density
from slime.observe.density_cells import Cell
from slime.observe.page_style import HEAT_COLOURS

ROUND = tuple(float(f"{m}e{e}") for e in range(-20, 1) for m in (1, 2, 5))  # ends of scales
MAX_COLUMNS = 60  # more versions are drawn as means of equal stretches
WIDTH, LEFT, RIGHT, TOP = 580, 74, 8, 24
LAYERS_HEIGHT = 380  # that all layers aim at
LOW, HIGH = 5.0, 22.0  # heights of a layer
BAND, GAP = 14.0, 6.0  # height of a row that is no layer; the gap between those and the layers, and between groups of columns
MAX_CELL = 60.0  # width
LETTER, LINE = 5.8, 12.0  # width and height of one in a tick
SCRIPT = """
for (const svg of document.querySelectorAll("svg.heat[data-heat]")) {
  const { rows, columns, whole, values } = JSON.parse(svg.dataset.heat), view = svg.viewBox.baseVal, mark = svg.querySelector(".mark");
  const find = (spans, at) => spans.findIndex(([from, size]) => at >= from && at < from + size);
  const box = document.getElementById("readout"), hide = () => { mark.style.opacity = 0; box.style.display = "none"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect(), scale = view.width / frame.width;
    const i = find(rows, (event.clientY - frame.top) * scale), cells = i >= 0 && values[i].length < columns.length ? [whole] : columns;
    const j = find(cells, (event.clientX - frame.left) * scale);
    if (i < 0 || j < 0 || !values[i][j]) return hide();
    const [top, height, row] = rows[i], [left, width, column] = cells[j];
    mark.setAttribute("d", `M${left} ${top}h${width}v${height}h${-width}z`); mark.style.opacity = 1;
    box.textContent = [row, column].filter(Boolean).join(", ") + "\\n" + values[i][j]; box.style.display = "block";
    box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
    box.style.top = Math.max(8, event.clientY - box.offsetHeight - 12) + "px";
  });
}
"""


@dataclass(frozen=True, slots=True)
class Share:
    """Elements that changed, of how many; over several versions both are sums."""

    changed: int
    size: int

    @property
    def value(self) -> float:
        return self.changed / self.size if self.size else 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """A row or a column: where it begins and how far it goes."""

    start: float
    size: float
    label: str  # in the read-out
    tick: str = ""  # on the axis

    @property
    def middle(self) -> float:
        return self.start + self.size / 2


@dataclass(frozen=True, slots=True)
class Scale:
    """Shares to colours, by their logarithm."""

    low: float
    high: float

    @classmethod
    def around(cls, shares: Sequence[Share]) -> "Scale | None":
        """At least a decade, ending at 1, 2 or 5 times powers of ten; None where nothing changed."""
        known = [s.value for s in shares if s.changed]
        if not known:
            return None
        high = next(r for r in ROUND if r >= max(known) * 0.999)
        low = min(min(known) * 1.001, high / 10 * 1.001)
        return cls(max(r for r in ROUND if r <= low), high)

    def at(self, share: float) -> float:
        """0 at the low end, 1 at the high end."""
        return math.log(share / self.low) / math.log(self.high / self.low)

    def colour(self, share: Share) -> str:
        """A class of the page's style."""
        return f"h{min(HEAT_COLOURS - 1, max(0, int(self.at(share.value) * HEAT_COLOURS)))}" if share.changed else "h-none"

    def ticks(self) -> list[float]:
        """Powers of ten, at most about six; 1, 2 and 5 times those where there are few."""
        inside = [t for t in ROUND if self.low * 0.999 <= t <= self.high * 1.001]
        decades = [t for t in inside if math.log10(t).is_integer()]
        return inside if len(inside) <= 7 else decades[:: math.ceil(len(decades) / 6)]


@dataclass(frozen=True, slots=True)
class Table:
    """The cells of a map. A row of one share goes across all columns."""

    rows: list[Span]
    columns: list[Span]
    shares: list[list[Share | None]]  # None where there is no such tensor

    def __iter__(self) -> Iterator[tuple[Span, Span, Share]]:
        for row, shares in zip(self.rows, self.shares, strict=True):
            columns = self.columns if len(shares) == len(self.columns) else [self.whole]
            yield from ((row, column, share) for column, share in zip(columns, shares, strict=True) if share and share.size)

    @property
    def whole(self) -> Span:
        """Across all columns."""
        end = self.columns[-1]
        return Span(self.columns[0].start, end.start + end.size - self.columns[0].start, "")

    @property
    def bottom(self) -> float:
        return self.rows[-1].start + self.rows[-1].size


def changed_weights(density: Density[Cell]) -> str:
    """The section of the page, "" where no version is recorded."""
    if not density.steps or not density.tensors:
        return ""
    rows = _rows([cell for cell, _ in density.tensors])
    newest, over_versions = _newest(density, rows), _over_versions(density, rows)
    scale = Scale.around([share for table in (newest, over_versions) for _, _, share in table])
    height = newest.bottom + _below(newest)
    step, share = density.steps[-1], Share(int(density.changed[-1].sum()), int(density.sizes.sum()))
    experts = ", the experts of a layer taken together" if any(cell.group == "experts" for cell, _ in density.tensors) else ""
    said = (
        f"Version {step} changed {percent(share.value)} of {short(share.size)} elements. The first map shows where: the share of changed "
        f"elements by layer and kind of tensor{experts}. The second one shows the same by layer over all versions."
    )
    by_kind = _picture(newest, scale, height, _kind_axis(newest), _exact)
    by_version = _picture(over_versions, scale, height, _version_axis(over_versions), lambda share: percent(share.value))
    maps = (
        _figure(f"Version {step} by kind", f"{short(share.changed)} elements changed", by_kind),
        _figure("All versions", _stretch(density.steps), by_version),
    )
    return (
        f'<h2>Changed weights</h2><p class="sub">{said}</p>{_key(scale)}<div class="grid two">{"".join(maps)}</div>'
        f'<script>addEventListener("load", () => {{{SCRIPT}}});</script>'
    )


def _figure(title: str, note: str, svg: str) -> str:
    caption = f'<figcaption><h3>{escape(title)}<span class="note">{escape(note)}</span></h3></figcaption>'
    return f'<figure class="card">{caption}<div>{svg}</div></figure>'


def _stretch(steps: Sequence[int]) -> str:
    columns = math.ceil(len(steps) / math.ceil(len(steps) / MAX_COLUMNS))
    return f"{len(steps):,} versions, means of {math.ceil(len(steps) / MAX_COLUMNS)}" if columns < len(steps) else ""


# --- what is in the maps ----------------------------------------------------------------------------------------------


def _rows(cells: Sequence[Cell]) -> list[Span]:
    """One for each layer and for each tensor outside of them, from the embedding down."""
    named = {cell.row: cell for cell in sorted(cells, key=lambda c: c.row_order)}
    layers = sum(cell.layer >= 0 for cell in named.values())
    height = min(HIGH, max(LOW, LAYERS_HEIGHT / max(1, layers)))
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * height >= 11 or s == 100)
    rows: list[Span] = []
    at, inside = float(TOP), None
    for name, cell in named.items():
        is_layer = cell.layer >= 0
        at += GAP if inside is not None and inside != is_layer else 0.0
        inside = is_layer
        size = height if is_layer else BAND
        rows.append(Span(at, size, name, (name if cell.layer == 0 else str(cell.layer)) if is_layer else name))
        if is_layer and cell.layer % stride:
            rows[-1] = Span(at, size, name)
        at += size + (0.0 if is_layer else 1.0)
    return rows


def _newest(density: Density[Cell], rows: list[Span]) -> Table:
    """Rows by kinds, of the newest version."""
    found = {cell: Share(int(n), size) for (cell, size), n in zip(density.tensors, density.changed[-1], strict=True)}
    kinds = {(c.group, c.kind): c for c in sorted((c for c in found if c.group), key=lambda c: c.column_order)}
    by_place = {(cell.row, cell.group, cell.kind): share for cell, share in found.items()}
    outside = {cell.row: share for cell, share in found.items() if not cell.group}
    groups = len({group for group, _ in kinds})
    width = min(MAX_CELL, (WIDTH - LEFT - RIGHT - GAP * max(0, groups - 1)) / max(1, len(kinds)))
    columns: list[Span] = []
    at = float(LEFT)
    for group, members in groupby(kinds, key=lambda k: k[0]):
        for _, kind in members:
            columns.append(Span(at, width, kind if kind.startswith(group) else f"{group} {kind}", kind))
            at += width
        at += GAP
    columns = columns or [Span(float(LEFT), MAX_CELL, "", "")]
    shares: list[list[Share | None]] = []
    for row in rows:
        shares.append([outside[row.label]] if row.label in outside else [by_place.get((row.label, *kind)) for kind in kinds])
    return Table(rows, columns, shares)


def _over_versions(density: Density[Cell], rows: list[Span]) -> Table:
    """Rows by versions."""
    owned = [[i for i, (cell, _) in enumerate(density.tensors) if cell.row == row.label] for row in rows]
    changed = np.stack([density.changed[:, columns].sum(1) for columns in owned], 1)
    sizes = [sum(density.tensors[i][1] for i in columns) for columns in owned]
    stretch = math.ceil(len(density.steps) / MAX_COLUMNS)
    cuts = [range(i, min(i + stretch, len(density.steps))) for i in range(0, len(density.steps), stretch)]
    width = min(MAX_CELL, (WIDTH - LEFT - RIGHT) / len(cuts))
    first, last = density.steps[0], density.steps[-1]
    marked = [int(v) for v in ticks(first, last, 5) if float(v).is_integer()] if first < last else []
    marked = marked or [last]
    columns: list[Span] = []
    shares: list[list[Share | None]] = []
    before = -1
    for i, cut in enumerate(cuts):
        first, last = density.steps[cut[0]], density.steps[cut[-1]]
        label = f"version {first}" if first == last else f"versions {first} to {last}"
        columns.append(Span(LEFT + i * width, width, label, next((str(step) for step in marked if before < step <= last), "")))
        shares.append([Share(int(n), size * len(cut)) for n, size in zip(changed[cut].sum(0), sizes, strict=True)])
        before = last
    return Table(rows, columns, [list(row) for row in zip(*shares, strict=True)])


# --- how they are drawn -----------------------------------------------------------------------------------------------


def _picture(table: Table, scale: Scale | None, height: float, axis: str, write: Callable[[Share], str]) -> str:
    """A map with what the read-out needs."""
    paths: dict[str, list[str]] = {}
    for row, column, share in table:
        x_pad, y_pad = 0.75 if column.size >= 14 else 0.0, 0.75 if row.size >= 11 else 0.0
        left, right = _n(column.start + x_pad), _n(column.start + column.size - x_pad)
        box = f"M{left} {_n(row.start + y_pad)}H{right}V{_n(row.start + row.size - y_pad)}H{left}z"  # neighbours share their edges
        paths.setdefault(scale.colour(share) if scale else "h-none", []).append(box)
    cells = "".join(f'<path class="{colour}" d="{"".join(boxes)}"/>' for colour, boxes in sorted(paths.items()))
    ticks = "".join(_tick(LEFT - 7, r.middle + 3.8, r.tick, "end") for r in table.rows if r.tick)
    data = {
        "rows": [[_r(r.start), _r(r.size), r.label] for r in table.rows],
        "columns": [[_r(c.start), _r(c.size), c.label] for c in table.columns],
        "whole": [_r(table.whole.start), _r(table.whole.size), ""],
        "values": [[write(s) if s and s.size else "" for s in row] for row in table.shares],
    }
    text = escape(json.dumps(data, separators=(",", ":")), quote=False).replace("'", "&#39;")
    size = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    inner = f'<g shape-rendering="crispEdges">{cells}</g>{ticks}{axis}<path class="mark"/>'
    return f"""<svg class="heat" {size} role="img" data-heat='{text}'>{inner}</svg>"""


def _exact(share: Share) -> str:
    return f"{percent(share.value)}\n{share.changed:,} of {share.size:,}"


def _slanted(table: Table) -> bool:
    """Whether a word is wider than its column."""
    return any(len(word) * LETTER > c.size for c in table.columns for word in c.tick.split())


def _below(table: Table) -> float:
    """Height of the kinds below the map."""
    if _slanted(table):
        return 16 + 0.66 * LETTER * max(len(c.tick) for c in table.columns)
    return 10 + LINE * max(len(_words(c)) for c in table.columns)


def _words(column: Span) -> list[str]:
    """The lines of a tick."""
    return [column.tick] if len(column.tick) * LETTER <= column.size else column.tick.split()


def _kind_axis(table: Table) -> str:
    """Kinds below, their groups above."""
    below = table.bottom + 15
    parts = []
    for c in table.columns:
        if _slanted(table):
            x, y = c.middle + 3, below - 3
            parts.append(_tick(x, y, c.tick, "end", f' transform="rotate(-40 {_n(x)} {_n(y)})"'))
        else:
            parts += [_tick(c.middle, below + i * LINE, word, "middle") for i, word in enumerate(_words(c))]
    for group, members in groupby(table.columns, key=lambda c: c.label.removesuffix(c.tick).strip()):
        spans = list(members)
        start, end = spans[0].start + 1, spans[-1].start + spans[-1].size - 1
        shown = next((name for name in (group, group.split(" ")[0]) if len(name) * LETTER <= end - start + GAP), "")
        if shown:
            parts.append(_tick((start + end) / 2, TOP - 12, shown, "middle"))
            parts.append(f'<path class="under" d="M{_n(start)} {TOP - 6}H{_n(end)}"/>')
    return "".join(parts)


def _version_axis(table: Table) -> str:
    """Some round versions below."""
    shown = "".join(_tick(c.middle, table.bottom + 15, c.tick, "middle") for c in table.columns if c.tick)
    return shown + _tick(LEFT, TOP - 12, "version →", "start")


def _key(scale: Scale | None) -> str:
    """The colours with their shares."""
    width, left, top = 260.0, 56.0, 2
    box = f'<path class="h-none" d="M0 {top}H26V{top + 11}H0z"/>' + _tick(13, top + 24, "none", "middle")
    if scale:
        edges = [_n(left + i * width / HEAT_COLOURS) for i in range(HEAT_COLOURS + 1)]
        for i, (start, end) in enumerate(pairwise(edges)):
            box += f'<path class="h{i}" d="M{start} {top}H{end}V{top + 11}H{start}z"/>'
        box += "".join(_tick(left + width * scale.at(t), top + 24, percent(t), "middle") for t in scale.ticks())
    return f'<svg class="heat heatkey" viewBox="0 0 340 30" role="img"><g shape-rendering="crispEdges">{box}</g></svg>'


def _tick(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text class="tick" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _r(value: float) -> float:
    return round(value, 1)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
