"""The page around a report: style and script of our own, nothing from a network."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f6; --card: #ffffff; --ink: #17201c; --soft: #5c6963; --faint: #98a39d; --line: #e2e7e4;
  --good: #137a4b; --bad: #b3362b; --warn: #96640a; --good-bg: #e0f3e8; --bad-bg: #fbe5e2; --warn-bg: #faefd7; --plain-bg: #eceFed;
  --c0: #0b7f5a; --c1: #c8621b; --c2: #4361c4; --c3: #a8398b; --c4: #8a7a13; --c5: #5b6b73; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1412; --card: #171e1b; --ink: #e6ece8; --soft: #9ba9a2; --faint: #66736c; --line: #28322d;
  --good: #5fd39b; --bad: #ff9086; --warn: #e9b65a; --good-bg: #14362a; --bad-bg: #43211d; --warn-bg: #3b2f14; --plain-bg: #242d29;
  --c0: #45c795; --c1: #f0965a; --c2: #8ea6ff; --c3: #e284c6; --c4: #d3c04e; --c5: #9fb0b8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-font-smoothing: antialiased; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.005em; margin: 44px 0 14px; font-weight: 620; }
h3 { font-size: 13.5px; margin: 0; font-weight: 600; }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.sub { color: var(--soft); margin: 6px 0 0; }
.pill { font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px; background: var(--plain-bg); color: var(--soft); white-space: nowrap; }
.pill.good { background: var(--good-bg); color: var(--good); } .pill.bad { background: var(--bad-bg); color: var(--bad); }
.pill.warn { background: var(--warn-bg); color: var(--warn); }
.reason { margin: 14px 0 0; padding: 10px 14px; border-radius: 8px; background: var(--bad-bg); color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.two { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 0; min-width: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 14px; }
.fact span { display: block; color: var(--soft); font-size: 12.5px; } .fact b { font-size: 19px; font-weight: 620; font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; margin-top: 24px; }
.score span.name { color: var(--soft); font-size: 13px; } .score .values { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; font-variant-numeric: tabular-nums; }
.score .values s { text-decoration: none; color: var(--faint); font-size: 26px; } .score .values b { font-size: 38px; font-weight: 660; letter-spacing: -.025em; line-height: 1.25; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 14px; margin-bottom: 8px; }
.note { color: var(--faint); font-weight: 400; margin-left: 7px; font-size: 12.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 13px; font-size: 12.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px; } .key b { color: var(--ink); font-weight: 600; }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); } i.c2 { background: var(--c2); } i.c3 { background: var(--c3); } i.c4 { background: var(--c4); } i.c5 { background: var(--c5); }
svg.chart { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg .grid, svg .limit, svg .cursor, svg .line { fill: none; vector-effect: non-scaling-stroke; }
svg .grid { display: inline; stroke: var(--line); } svg .limit { stroke: var(--bad); stroke-dasharray: 4 4; } svg .cursor { stroke: var(--faint); opacity: 0; }
svg .line { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; } svg .tick { fill: var(--faint); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); } svg .c2 { stroke: var(--c2); } svg .c3 { stroke: var(--c3); } svg .c4 { stroke: var(--c4); } svg .c5 { stroke: var(--c5); }
svg .dot { stroke: var(--card); stroke-width: 1; } svg .area { stroke: none; opacity: .88; }
svg .dot.c0, svg .area.c0 { fill: var(--c0); } svg .dot.c1, svg .area.c1 { fill: var(--c1); } svg .dot.c2, svg .area.c2 { fill: var(--c2); }
svg .dot.c3, svg .area.c3 { fill: var(--c3); } svg .dot.c4, svg .area.c4 { fill: var(--c4); } svg .dot.c5, svg .area.c5 { fill: var(--c5); }
#readout { position: fixed; pointer-events: none; display: none; background: var(--ink); color: var(--bg); border-radius: 7px; padding: 6px 10px; font-size: 12px; line-height: 1.45;
  font-variant-numeric: tabular-nums; z-index: 9; white-space: pre; }
table { width: 100%; border-collapse: collapse; } th { text-align: left; font-size: 12.5px; font-weight: 600; color: var(--soft); padding: 0 12px 8px 0; }
td { vertical-align: top; padding: 9px 12px 9px 0; border-top: 1px solid var(--line); } th:last-child, td:last-child { padding-right: 0; }
.scroll { overflow-x: auto; } td { min-width: 110px; } td.label { min-width: 60px; }
.text { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.sample { margin-bottom: 12px; padding-bottom: 12px; border-bottom: 1px solid var(--line); } .sample:last-child { margin: 0; padding: 0; border: 0; }
.sample .prompt { color: var(--soft); max-height: 9em; overflow: auto; } .sample .response { margin-top: 5px; max-height: 18em; overflow: auto; }
.sample .meta, td .meta { display: flex; flex-wrap: wrap; gap: 5px 8px; align-items: center; font-size: 12px; color: var(--faint); margin-bottom: 5px; }
td .meta { margin: 4px 0 0; }
.step { font-size: 13.5px; font-weight: 600; margin: 0 0 12px; } .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; align-items: start; }
.bar { display: flex; height: 12px; border-radius: 6px; overflow: hidden; background: var(--plain-bg); margin: 12px 0 10px; } .bar i { display: block; height: 100%; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; font-size: 13.5px; } details .text { margin-top: 12px; max-height: 70vh; overflow: auto; }
.paths { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; } .paths dt { color: var(--soft); } .paths dd { margin: 0; }
@media (max-width: 560px) { main { padding: 20px 14px 40px; } .grid, .two { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

SCRIPT = """
const box = document.getElementById("readout");
for (const svg of document.querySelectorAll("svg.chart")) {
  const { names, rows } = JSON.parse(svg.dataset.chart), cursor = svg.querySelector(".cursor"), view = svg.viewBox.baseVal;
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) * view.width / frame.width;
    let row = rows[0];
    for (const r of rows) if (Math.abs(r[0] - at) < Math.abs(row[0] - at)) row = r;
    cursor.setAttribute("transform", `translate(${row[0]} 0)`); cursor.style.opacity = 1;
    box.textContent = [`step ${row[1]}`, ...names.map((n, i) => row[i + 2] && `${n}  ${row[i + 2]}`).filter(Boolean)].join("\\n");
    box.style.display = "block";
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    box.style.left = left + "px"; box.style.top = Math.max(8, event.clientY - box.offsetHeight - 12) + "px";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.opacity = 0; box.style.display = "none"; });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document. `title` is plain text, `body` is HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    readout = '<div id="readout"></div>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>{body}</main>{readout}<script>{SCRIPT}</script></body></html>\n'
