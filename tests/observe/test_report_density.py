import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slime.observe.density import NAME, DensityLog, Tensor
from slime.observe.metrics import MetricsLog
from slime.observe.page_style import HEAT_COLOURS, STYLE
from slime.observe.report import write_report
from slime.observe.report_density import MAX_COLUMNS, WIDTH, Scale, Share

EVIL = """layers.0.self_attn.</svg></script><script>alert(1)</script>'"&_proj.weight"""


class Page(HTMLParser):
    """Checks that tags are balanced; collects the maps, what is drawn in them, and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.maps: list[dict] = []
        self.views: list[list[float]] = []
        self.paths: list[list[tuple[str, str]]] = []  # of every map: (class, d)
        self.scripts, self.text = 0, ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {k: v or "" for k, v in attrs}
        self.scripts += tag == "script"
        if "data-heat" in names:
            self.maps.append(json.loads(names["data-heat"]))
            self.views.append([float(v) for v in names["viewbox"].split()])
            self.paths.append([])
        elif tag == "path" and self.maps and "d" in names:
            self.paths[-1].append((names["class"], names["d"]))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + "\n"


def model(layers: int, experts: int = 0) -> list[Tensor]:
    tensors = [("model.embed_tokens.weight", 5000)]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += [(f"{prefix}self_attn.{x}_proj.weight", 1000) for x in "qkvo"] + [(f"{prefix}input_layernorm.weight", 10)]
        if experts and layer:
            tensors.append((f"{prefix}mlp.gate.weight", 100))
            tensors += [(f"{prefix}mlp.experts.{e}.{x}_proj.weight", 100) for e in range(experts) for x in ("gate", "up", "down")]
        else:
            tensors += [(f"{prefix}mlp.{x}_proj.weight", 2000) for x in ("gate", "up", "down")]
    return [*tensors, ("model.norm.weight", 10), ("lm_head.weight", 5000)]


def report(directory: Path, tensors: list[Tensor], versions: list[list[int]], *, first: int = 1) -> Page:
    log = DensityLog(directory / NAME)
    for step, changed in enumerate(versions, first):
        log.append(step, changed, tensors)
    return Page(write_report(directory))


def labels(page: Page, which: int, of: str) -> list[str]:
    return [span[2] for span in page.maps[which][of]]


def test_nothing_is_shown_without_versions(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append(0, {})
    assert "Changed weights" not in Page(write_report(tmp_path)).text
    (tmp_path / NAME).write_text('{"tensors":[["a",1]]}\n{"step":1,"chan')
    page = Page(write_report(tmp_path))
    assert "Changed weights" not in page.text and page.scripts == 1 and not page.maps


def test_the_newest_version_is_shown_by_layer_and_kind(tmp_path: Path) -> None:
    tensors = model(3, experts=4)
    names = [name for name, _ in tensors]
    changed = [0] * len(tensors)
    changed[names.index("model.layers.1.self_attn.v_proj.weight")] = 7
    for expert in range(4):
        changed[names.index(f"model.layers.2.mlp.experts.{expert}.up_proj.weight")] = expert
    changed[0] = 1234
    page = report(tmp_path, tensors, [[1] * len(tensors), changed], first=5)
    rows, columns, values = labels(page, 0, "rows"), labels(page, 0, "columns"), page.maps[0]["values"]
    assert rows == ["embedding", "layer 0", "layer 1", "layer 2", "final norm", "lm_head"]
    assert columns[:7] == ["attention q", "attention k", "attention v", "attention o", "mlp gate", "mlp up", "mlp down"]
    assert columns[7:] == ["router", "experts gate", "experts up", "experts down", "norms input"]
    assert values[0] == ["24.7%\n1,234 of 5,000"] and values[5] == ["0%\n0 of 5,000"]
    assert values[2][columns.index("attention v")] == "0.7%\n7 of 1,000"
    assert values[3][columns.index("experts up")] == "1.5%\n6 of 400"
    assert values[1][columns.index("experts up")] == "" and values[2][columns.index("mlp up")] == ""  # there are none
    size = sum(size for _, size in tensors)
    assert f"Version 6 changed {100 * 1247 / size:.3g}% of {size / 1000:.1f}k elements" in page.text
    assert "experts of a layer taken together" in page.text and "1.2k elements changed" in page.text


def test_all_versions_are_shown_by_layer(tmp_path: Path) -> None:
    tensors = model(2)
    versions = [[k if ".layers.1." in name else 0 for name, _ in tensors] for k in (1, 2, 3)]
    page = report(tmp_path, tensors, versions)
    assert labels(page, 1, "columns") == ["version 1", "version 2", "version 3"]
    layer = sum(size for name, size in tensors if ".layers.1." in name)
    assert page.maps[1]["values"][2] == [f"{100 * 8 * k / layer:.3g}%" for k in (1, 2, 3)]
    assert page.maps[1]["values"][1] == ["0%"] * 3
    assert [r[:2] for r in page.maps[0]["rows"]] == [r[:2] for r in page.maps[1]["rows"]] and page.views[0] == page.views[1]


@pytest.mark.parametrize("count", [MAX_COLUMNS, MAX_COLUMNS + 1, 1000])
def test_many_versions_are_means_of_stretches(tmp_path: Path, count: int) -> None:
    log = tmp_path / NAME  # written at once: a thousand fsyncs take long
    lines = [json.dumps({"step": k, "changed": [k % 2]}, separators=(",", ":")) for k in range(1, count + 1)]
    log.write_text('{"tensors":[["model.layers.0.mlp.up_proj.weight",10]]}\n' + "\n".join(lines) + "\n")
    page = Page(write_report(tmp_path))
    columns = labels(page, 1, "columns")
    assert len(columns) <= MAX_COLUMNS and columns[-1].endswith(str(count))
    if count == 1000:
        assert columns[0] == "versions 1 to 17" and page.maps[1]["values"][0][0] == f"{100 * 9 / 170:.3g}%"
        assert "1,000 versions, means of 17" in page.text


@pytest.mark.parametrize("layers", [1, 2, 28, 94, 300])
def test_a_map_keeps_within_its_frame_and_cells_apart(tmp_path: Path, layers: int) -> None:
    tensors = model(layers, experts=8)
    page = report(tmp_path, tensors, [[size // 7 for _, size in tensors]] * 3)
    for heat, (_, _, width, height), paths in zip(page.maps, page.views, page.paths, strict=True):
        assert width == WIDTH
        for spans, limit in ((heat["rows"], height), (heat["columns"], width)):
            ends = [start + size for start, size, _ in spans]
            assert all(size > 0 for _, size, _ in spans) and ends[-1] <= limit
            assert all(end <= after[0] + 0.11 for end, after in zip(ends, spans[1:], strict=False))
        for _, drawn in paths:
            for left, top, right, bottom, back in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H([\d.]+)z", drawn):
                assert left == back and 0 < float(left) < float(right) <= width and 0 < float(top) < float(bottom) <= height
    drawn = sum(d.count("z") for _, d in page.paths[0])
    assert drawn == sum(value != "" for row in page.maps[0]["values"] for value in row)


def test_colours_follow_the_share(tmp_path: Path) -> None:
    tensors = [(f"model.layers.0.self_attn.{x}_proj.weight", 10**6) for x in "qkvo"]
    page = report(tmp_path, tensors, [[0, 10, 1000, 100_000]])
    left = {re.match(r"M([\d.]+)", d)[1]: colour for colour, d in page.paths[0] if colour.startswith("h")}  # type: ignore[index]
    assert [left[at] for at in sorted(left, key=float)] == ["h-none", "h0", f"h{HEAT_COLOURS // 2}", f"h{HEAT_COLOURS - 1}"]
    assert all(f"svg .{colour} {{" in STYLE for colour in left.values())
    assert STYLE.count(f"--h{HEAT_COLOURS - 1}: #") == 2  # light and dark
    for tick in ("none", "0.001%", "0.1%", "10%"):
        assert tick in page.text.split("\n")


def test_a_version_that_changed_nothing_has_no_scale(tmp_path: Path) -> None:
    page = report(tmp_path, model(2), [[0] * len(model(2))])
    assert {colour for colour, _ in page.paths[0] if colour.startswith("h")} == {"h-none"}
    assert "changed 0% of" in page.text and "none" in page.text.split("\n")


@pytest.mark.parametrize(
    ("changed", "low", "high"), [([300, 400], 0.05e-3, 0.5e-3), ([1, 10**6], 1e-6, 1.0), ([15, 10**5], 1e-5, 0.1), ([2], 2e-7, 2e-6)]
)
def test_a_scale_shows_every_share(changed: list[int], low: float, high: float) -> None:
    shares = [Share(n, 10**6) for n in changed]
    scale = Scale.around([*shares, Share(0, 10)])
    assert scale and scale.low == pytest.approx(low) and scale.high == pytest.approx(high)
    assert all(-0.01 <= scale.at(s.value) <= 1.01 for s in shares)
    assert 2 <= len(scale.ticks()) <= 7 and all(low * 0.99 <= t <= high * 1.01 for t in scale.ticks())
    assert Scale.around([Share(0, 10)]) is None


def test_names_are_escaped(tmp_path: Path) -> None:
    page = report(tmp_path, [(EVIL, 10), (f"{EVIL}.outside", 10)], [[1, 2]])
    assert page.scripts == 2 and any("alert(1)" in name for name in labels(page, 0, "columns") + labels(page, 0, "rows"))


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    tensors = model(94, experts=128)
    lines = [json.dumps({"step": k, "changed": [k % 50] + [1] * (len(tensors) - 1)}, separators=(",", ":")) for k in range(1, 71)]
    head = json.dumps({"tensors": tensors}, separators=(",", ":"))
    (tmp_path / NAME).write_text("\n".join([head, *lines]) + "\n")
    path = write_report(tmp_path)
    assert path.stat().st_size < 300_000
    assert labels(Page(path), 0, "rows")[50] == "layer 49"


def test_the_sync_of_weights_has_curves(tmp_path: Path) -> None:
    titles = {
        "Changed weights": {"sync/density": 1e-3},
        "Bytes on the wire": {"sync/wire_bytes": 1e6},
        "Compression": {"sync/ratio": 80.0},
        "Seconds of a sync": {"sync/diff_s": 0.1, "sync/verify_s": 0.2},
    }
    for title, metrics in titles.items():
        log = MetricsLog(tmp_path / title / "metrics.jsonl")
        for step in range(3):
            log.append(step, metrics if step else {})
        text = Page(write_report(tmp_path / title)).text
        assert [t for t in titles if t in text] == [title] and "Weight sync" in text
    assert "diff" in text and "verify" in text and "encode" not in text
    MetricsLog(tmp_path / "metrics.jsonl").append(0, {})
    assert "Weight sync" not in Page(write_report(tmp_path)).text
