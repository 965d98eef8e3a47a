"""The page around a report, with the script that reads values out of the charts; nothing comes from a network."""

from html import escape

from slime.observe.page_style import STYLE

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
    foot = f'<div id="readout"></div><script>{SCRIPT}</script>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>{body}</main>{foot}</body></html>\n'
