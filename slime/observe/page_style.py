"""The style of a report: one sheet, light and dark. Charts use the colours c0 to c5, heat maps h0 (little) to h15 (much) and h-none."""

HEAT_COLOURS = 16
_HEAT_LIGHT = ("efe7a0", "b4d68f", "66bd97", "2a938f", "22648f", "2c2a72")
_HEAT_DARK = ("35306f", "2b5f92", "27918c", "5fbd8c", "b9da86", "f8f2a6")


def _ramp(anchors: tuple[str, ...]) -> str:
    """HEAT_COLOURS variables, evenly spread over the anchors."""
    out = []
    for i in range(HEAT_COLOURS):
        at = i * (len(anchors) - 1) / (HEAT_COLOURS - 1)
        low = min(int(at), len(anchors) - 2)
        mixed = [round(a + (at - low) * (b - a)) for a, b in zip(*map(bytes.fromhex, anchors[low : low + 2]), strict=True)]
        out.append(f"--h{i}: #{bytes(mixed).hex()};")
    return " ".join(out)


_LIGHT = """
  --bg: #f6f7f6; --card: #ffffff; --ink: #17201c; --soft: #5c6963; --faint: #7f8b85; --line: #e2e7e4;
  --good: #137a4b; --bad: #b3362b; --warn: #8a5c08;
  --good-bg: #e0f3e8; --bad-bg: #fbe5e2; --warn-bg: #faefd7; --plain-bg: #eceeed;
  --c0: #0b7f5a; --c1: #c8621b; --c2: #4361c4; --c3: #a8398b; --c4: #8a7a13; --c5: #5b6b73; --none: #e4e7e6;
"""
_DARK = """
  --bg: #0f1412; --card: #171e1b; --ink: #e6ece8; --soft: #9ba9a2; --faint: #78867f; --line: #28322d;
  --good: #5fd39b; --bad: #ff9086; --warn: #e9b65a;
  --good-bg: #14362a; --bad-bg: #43211d; --warn-bg: #3b2f14; --plain-bg: #242d29;
  --c0: #45c795; --c1: #f0965a; --c2: #8ea6ff; --c3: #e284c6; --c4: #d3c04e; --c5: #9fb0b8; --none: #2a332f;
"""
_TEXT = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.005em; margin: 44px 0 14px; font-weight: 620; }
h3 { font-size: 13.5px; margin: 0; font-weight: 600; }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.sub { color: var(--soft); margin: 6px 0 0; overflow-wrap: anywhere; }
.note { color: var(--faint); font-weight: 400; margin-left: 7px; font-size: 12.5px; }
.pill { font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px; white-space: nowrap;
  background: var(--plain-bg); color: var(--soft); }
.pill.good { background: var(--good-bg); color: var(--good); }
.pill.bad { background: var(--bad-bg); color: var(--bad); }
.pill.warn { background: var(--warn-bg); color: var(--warn); }
.reason { margin: 14px 0 0; padding: 10px 14px; border-radius: 8px; background: var(--bad-bg); color: var(--bad);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""
_CARDS = """
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 0; min-width: 0; }
.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; margin-top: 24px; }
.score .name { color: var(--soft); font-size: 13px; }
.score .values { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; font-variant-numeric: tabular-nums; }
.score .values s { text-decoration: none; color: var(--faint); font-size: 26px; }
.score .values b { font-size: 38px; font-weight: 660; letter-spacing: -.025em; line-height: 1.25; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 14px; }
.fact span { display: block; color: var(--soft); font-size: 12.5px; }
.fact b { font-size: 19px; font-weight: 620; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.bar { display: flex; height: 12px; border-radius: 6px; overflow: hidden; background: var(--plain-bg); margin: 12px 0 10px; }
.bar i { display: block; height: 100%; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; font-size: 13.5px; }
details .text { margin-top: 12px; max-height: 70vh; overflow: auto; }
.paths { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; align-items: baseline; }
.paths dt { color: var(--soft); font-size: 13px; }
.paths dd { margin: 0; }
"""
_CHARTS = """
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; margin-bottom: 8px; }
figure { display: flex; flex-direction: column; justify-content: space-between; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 13px; font-size: 12.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px; }
.key b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg path { fill: none; vector-effect: non-scaling-stroke; }
svg .grid { display: inline; stroke: var(--line); }
svg .limit { stroke: var(--bad); stroke-dasharray: 4 4; }
svg .cursor { stroke: var(--faint); opacity: 0; }
svg .line { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .tick { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .dot { stroke: var(--card); stroke-width: 1; }
svg .area { opacity: .88; }
#readout { position: fixed; pointer-events: none; display: none; z-index: 9; white-space: pre; padding: 6px 10px; border-radius: 7px;
  background: var(--ink); color: var(--bg); font-size: 12px; line-height: 1.45; font-variant-numeric: tabular-nums; }
"""
_HEAT = """
.heatkey { width: 340px; max-width: 100%; margin: 10px 0 14px; }
.heatkey .tick { fill: var(--soft); }
svg.heat { cursor: crosshair; }
svg .under { stroke: var(--line); stroke-width: 1.5; }
svg .mark { stroke: var(--ink); stroke-width: 1.5; opacity: 0; pointer-events: none; }
svg .h-none { fill: var(--none); }
"""
_SAMPLES = """
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-size: 12.5px; font-weight: 600; color: var(--soft); padding: 0 36px 8px 0; }
td { vertical-align: baseline; padding: 9px 36px 9px 0; border-top: 1px solid var(--line); min-width: 110px; }
th:last-child, td:last-child { padding-right: 0; }
td.label { min-width: 60px; }
.meta { display: flex; flex-wrap: wrap; gap: 5px 8px; align-items: center; font-size: 12px; color: var(--faint); margin-bottom: 5px; }
.answer { display: flex; flex-wrap: wrap; gap: 4px 12px; justify-content: space-between; align-items: baseline; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; align-items: start; }
.step { font-size: 13.5px; font-weight: 600; margin: 0 0 12px; }
.sample { margin-bottom: 12px; padding-bottom: 12px; border-bottom: 1px solid var(--line); }
.sample:last-child { margin: 0; padding: 0; border: 0; }
.sample .prompt { color: var(--soft); max-height: 9em; overflow: auto; }
.sample .response { margin-top: 5px; max-height: 18em; overflow: auto; }
@media (max-width: 560px) { main { padding: 20px 14px 40px; } .grid, .grid.two { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
_COLOURS = "".join(
    f"i.c{i} {{ background: var(--c{i}); }}\nsvg .line.c{i} {{ stroke: var(--c{i}); }}\n"
    f"svg .dot.c{i}, svg .area.c{i} {{ fill: var(--c{i}); }}\n"
    for i in range(6)
) + "".join(f"svg .h{i} {{ fill: var(--h{i}); }}\n" for i in range(HEAT_COLOURS))
_ROOT = f":root {{ color-scheme: light dark; {_LIGHT} {_ramp(_HEAT_LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} {_ramp(_HEAT_DARK)} }} }}"
STYLE = f"{_ROOT}\n{_TEXT}{_CARDS}{_CHARTS}{_HEAT}{_SAMPLES}{_COLOURS}\n"
