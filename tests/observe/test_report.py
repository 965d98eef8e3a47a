import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slime.observe import curves
from slime.observe.account import AccountLog, Settled
from slime.observe.charts import MAX_POINTS, Axis, Series, line_chart, number, percent, stacked_chart, ticks
from slime.observe.curves import Curve
from slime.observe.metrics import MetricsLog
from slime.observe.report import write_report
from slime.observe.report_curves import MAX_LINES
from slime.observe.report_examples import read_examples
from slime.observe.summary import Summary, before_and_after, read_summary, write_summary
from tests.observe.test_documented_metrics import documented

EVIL = """</pre></script><script>alert(1)</script><img src=x onerror='alert(2)'> "quoted" 'single' & {model.path}"""
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects them; scripts by count, links to elsewhere by address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.charts: list[dict] = []
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = dict(attrs)
        assert not names.keys() & {"src", "href", "onerror", "onload"}, names
        if "data-chart" in names:
            self.charts.append(json.loads(names["data-chart"] or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + "\n"


def run_of(directory: Path, steps: int, *, sets: tuple[str, ...] = ("heldout",), text: str = "2+3=", every: int = 1) -> Path:
    lines, rows = [], []
    for k in range(steps + 1):
        evaluated = k % every == 0 or k == steps
        line: dict[str, float | None] = {f"eval/{s}/accuracy": 0.3 + 0.5 * k / max(1, steps) for s in sets if evaluated}
        if k:
            line |= {
                "reward/mean": None if k == 2 else 0.3 + 0.1 * math.sin(k),
                "response_len/mean": 12.0,
                "reward/error_frac": 0.0,
                "train/grad_norm": 1.0,
                "mismatch/logprob_abs_diff": 0.0 if k == 1 else 1e-6 * k,
                "time/rollout_s": 2.0,
                "time/train_s": 1.0,
                "time/step_s": 3.1,
                "perf/tokens_per_s": 4000.0,
                "ledger/drawn": 9.0 * k,
                "ledger/trained": 8.0 * k,
                "ledger/dropped": 1.0 * k,
                "ledger/pending": 0.0,
            }
        if k and evaluated:
            row = {"step": k, "prompt": text, "label": 5, "source": text}
            rows += [{**row, "response": f"answer {k}.{i}", "reward": i / 2} for i in range(6)]
        if evaluated:
            row = {"step": k, "reward": 1, "label": None, "source": "eval/heldout"}
            rows += [{**row, "prompt": f"{text}{i}", "response": f"eval {k}.{i}"} for i in range(2)]
        lines.append({"step": k, **line})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {"model": {"path": text, "dtype": "fp32"}, "algorithm": {"name": "grpo"}, "observe": {"mismatch_stop": 2e-6}}
    (directory / "config.yaml").write_text(json.dumps(recipe))
    return directory


def summed_up(directory: Path, **changes: object) -> Summary:
    summary = Summary("done", 4, 187.0, {"heldout": 0.3}, {"heldout": 0.8}, {"report": str(directory / "report.html")})
    return dataclasses.replace(summary, **changes)  # type: ignore[arg-type]


def test_a_report_tells_the_run(tmp_path: Path) -> None:
    run_of(tmp_path, 4)
    write_summary(tmp_path, summed_up(tmp_path))
    assert read_summary(tmp_path) == summed_up(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html" and path.stat().st_size < 100_000
    page = Page(path)
    for said in (
        "done",
        "30% →",
        "80%",
        "+50.0 points",
        "3 min 07 s",
        "Evaluation accuracy",
        "Mean reward",
        "Seconds of a step",
        "adds up",
        "36 prompts",
    ):
        assert said in page.text, said
    for update in (1, 3, 4):
        assert f"Update {update}\n" in page.text and f"answer {update}.0" in page.text
    assert "answer 2.0" not in page.text and "answer 1.5" not in page.text
    assert "eval 0.1" in page.text and "eval 4.1" in page.text and "eval 2.1" not in page.text
    assert "Reward errors" not in page.text and "Entropy" not in page.text  # all zero; not measured
    reward = next(c for c in page.charts if c["names"] == ["mean"] and len(c["rows"]) == 4)
    assert [row[1:] for row in reward["rows"]][:2] == [[1, number(0.3 + 0.1 * math.sin(1))], [2, ""]]  # NaN is a gap


def test_curves_are_of_what_was_measured(tmp_path: Path) -> None:
    titles = {
        "Staleness": {"staleness/mean": 1.5, "staleness/max": 3.0},
        "KL(rollout, trainer)": {"offpolicy/kl": 1e-3},
        "Effective sample size": {"offpolicy/ess": 0.9},
        "Ratio trainer / rollout": {"offpolicy/ratio_mean": 1.01, "offpolicy/ratio_max": 3.0},
        "Importance weight": {"train/importance": 0.98},
        "Weights out of bounds": {"train/importance_bounded_frac": 0.02},
        "Tokens left out": {"train/importance_rejected_frac": 0.02, "train/opsm_frac": 0.01},
        "KL(policy, reference)": {"train/ref_kl": 0.01},
        "Advantages": {"advantage/mean": 0.0, "advantage/std": 0.9},
        "Overlong penalty": {"reward/overlong_penalty": -0.1},
        "KL(student, teacher)": {"distill/reverse_kl": 0.4},
        "Divergence from the teacher": {"train/distillation": 0.4},
        "Value loss": {"value/loss": 0.4},
        "Explained variance of the returns": {"value/explained_variance": 0.4},
        "Gradient norm of the critic": {"critic/grad_norm": 0.4},
        "Experts that replay changed": {"mismatch/experts_changed_frac": 0.01},
        "mean without replay": {"mismatch/logprob_abs_diff_without_replay": 6e-3},
        "Tokens per second and GPU": {"perf/tokens_per_s_per_gpu": 900.0},
        "Model FLOPs utilisation": {"perf/mfu": 0.4},
        "Peak GPU memory": {"perf/gpu_mem_gb": 31.0},
    }
    for title, metrics in titles.items():
        log = MetricsLog(tmp_path / title / "metrics.jsonl")
        for step in range(3):
            log.append(step, metrics if step else {})
        text = Page(write_report(tmp_path / title)).text
        assert [t for t in titles if t in text] == [title]


def test_every_teacher_has_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append(step, {"distill/reverse_kl": 0.5, "distill/math/reverse_kl": 0.4, "distill/code/reverse_kl": 0.6} if step else {})
    page = Page(write_report(tmp_path))
    assert [c["names"] for c in page.charts] == [["all", "code", "math"]] and "Distillation" in page.text


@pytest.mark.parametrize(
    "metric",
    sorted({m for specs in vars(curves).values() if isinstance(specs, tuple) for c in specs if isinstance(c, Curve) for m, _ in c.metrics}),
)
def test_what_is_drawn_is_recorded_by_that_name(metric: str) -> None:
    of_the_critic = metric.startswith(("value/", "critic/"))
    assert of_the_critic or metric in documented()


def test_supervised_training_is_shown_as_such(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append(step, {"train/loss": 3.0 - step, "train/nll": 3.0 - step} if step else {})
    rollout = {"prompts_per_step": 64, "samples_per_prompt": 8, "mode": "sync"}
    (tmp_path / "config.yaml").write_text(json.dumps({"algorithm": {"name": "sft"}, "rollout": rollout}))
    row = {"step": 1, "prompt": "p", "response": "a demonstration", "label": "a demonstration", "reward": None}
    (tmp_path / "examples.jsonl").write_text(json.dumps(row) + "\n")
    text = Page(write_report(tmp_path)).text
    assert "64 examples an update" in text and text.count("a demonstration") == 1
    assert not [said for said in ("answers an update", "sync", "no reward", "label") if said in text.split("Resolved recipe")[0]]


def test_every_evaluation_set_and_measure_is_drawn(tmp_path: Path) -> None:
    log, names = MetricsLog(tmp_path / "metrics.jsonl"), [f"set{i}" for i in range(MAX_LINES + 2)]
    for step in range(2):
        of_all = {f"eval/{n}/accuracy": 0.5 for n in names}
        log.append(step, of_all | {"eval/set0/avg_at_k": 0.4, "eval/set0/pass_at_k": 0.9})
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"eval": {"set0": {"path": "p", "samples": 4}}}}))
    page = Page(write_report(tmp_path))
    assert [c["names"] for c in page.charts] == [names[:MAX_LINES], names[MAX_LINES:], ["set0, k = 4"], ["set0, k = 4"]]
    titles = ("Evaluation accuracy, 1 of 2", "Evaluation accuracy, 2 of 2", "Evaluation avg@k", "Evaluation pass@k")
    assert all(title in page.text for title in titles)


def test_sources_that_are_not_drawn_are_told(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append(step, {"reward/mean": 0.5} | {f"reward/s{i}/mean": 0.5 for i in range(9)} if step else {})
    assert f"{MAX_LINES - 1} of 9 sources" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize(("loss", "shown"), [(-0.0261257006, False), (-0.0262, True)])
def test_a_loss_that_is_the_policy_loss_is_drawn_once(tmp_path: Path, loss: float, shown: bool) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append(step, {"train/pg_loss": -0.0261257017, "train/loss": loss} if step else {})
    text = Page(write_report(tmp_path)).text
    assert "Policy loss" in text and ("\nLoss\n" in text) == shown


def test_axes_are_named_and_long_texts_scroll(tmp_path: Path) -> None:
    run_of(tmp_path, 4, text="x" * 9000)
    path = write_report(tmp_path)
    page = Page(path)
    assert page.text.count("update\n") >= len(page.charts) > 4
    assert "log-prob difference, worst step mean" in page.text
    table = path.read_text().split("<table>")[1].split("</table>")[0]
    assert table.count("<pre") == table.count("overflow: auto") > 0


def test_every_text_is_escaped(tmp_path: Path) -> None:
    run_of(tmp_path, 3, sets=("heldout", EVIL), text=EVIL)
    write_summary(tmp_path, summed_up(tmp_path, status="failed", reason=EVIL, paths={EVIL: EVIL}))
    path = write_report(tmp_path)
    page = Page(path)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count("alert(1)") >= 12
    assert any(EVIL in chart["names"] for chart in page.charts)


def test_a_report_needs_no_network(tmp_path: Path) -> None:
    text = write_report(run_of(tmp_path, 3)).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|src=", text)


def test_runs_that_were_cut_short_have_a_report(tmp_path: Path) -> None:
    assert "no ending recorded" in Page(write_report(tmp_path)).text  # nothing at all
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward/mean": 0.5, "train/entropy": null}\n{"ste')
    (tmp_path / "examples.jsonl").write_text('{"step": 1, "prompt": "p", "response": "whole", "reward": null}\n{"step": 1, "pro')
    page = Page(write_report(tmp_path))
    assert "whole" in page.text and "no reward" in page.text and "0.5" in page.text
    write_summary(tmp_path, summed_up(tmp_path, status="failed", reason="engine 0 died\n  tail of its log"))
    assert "tail of its log" in Page(write_report(tmp_path)).text


def test_an_evaluation_alone_and_one_that_got_worse_are_shown_as_they_are(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(0, {"eval/heldout/accuracy": 0.5})
    assert "accuracy before the first update on" in Page(write_report(tmp_path)).text
    log.append(1, {"eval/heldout/accuracy": 0.25})
    assert "-25.0 points" in Page(write_report(tmp_path)).text


def settle(directory: Path, *trained: list[int], dropped: dict[int, str] | None = None) -> None:
    log = AccountLog(directory / "ledger.jsonl")
    for k, ordinals in enumerate(trained, 1):
        log.append(Settled(k, ordinals, (dropped or {}) if k == len(trained) else {}))


def test_the_ledger_counts_every_prompt(tmp_path: Path) -> None:
    """Of what metrics.jsonl has recorded: the account may be a line ahead."""
    run_of(tmp_path, 2)
    assert "settled once" not in Page(write_report(tmp_path)).text
    settle(tmp_path, list(range(9)), [*range(9, 16)], dropped={16: "filter", 17: "too_long"})
    AccountLog(tmp_path / "ledger.jsonl").append(Settled(3, [18, 18]))
    text = Page(write_report(tmp_path)).text
    for said in ("18 prompts drawn = trained + dropped + pending", "adds up", "every prompt settled once: yes", "filter", "too_long"):
        assert said in text, said


def test_a_ledger_that_does_not_add_up_says_so(tmp_path: Path) -> None:
    run_of(tmp_path, 2)
    settle(tmp_path, list(range(9)), list(range(9, 17)))
    assert "accounts for 17" in Page(write_report(tmp_path)).text
    for faulty, says in (
        ([[0, 1], [1, 2, 4]], "prompt 1 was settled twice, by updates 1 and 2; missing are the prompts 3"),
        ([[0, 1]], "ledger.jsonl ends at update 1 of 2"),
    ):
        (tmp_path / "ledger.jsonl").unlink()
        settle(tmp_path, *faulty)
        text = Page(write_report(tmp_path)).text
        assert "every prompt settled once: no" in text and says in text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    run_of(tmp_path, 2500, sets=("a", "b", "c"), text="x" * 9000, every=50)
    path = write_report(tmp_path)
    assert path.stat().st_size < 600_000
    page = Page(path)
    assert "6,600 characters left out" in page.text
    assert max(len(c["rows"]) for c in page.charts) <= MAX_POINTS + 60


def test_examples_trained_again_after_a_resume_count_once(tmp_path: Path) -> None:
    rows = [(1, "a"), (2, "old"), (3, "lost"), (2, "again"), (3, "new")]
    lines = [json.dumps({"step": s, "prompt": "p", "response": r, "reward": 1.0}) + "\n" for s, r in rows]
    (tmp_path / "e").write_text("".join(lines))
    assert [(e.step, e.response) for e in read_examples(tmp_path / "e")] == [(1, "a"), (2, "old"), (2, "again"), (3, "new")]


def test_before_and_after_are_the_first_line_and_the_last_evaluation() -> None:
    lines = [
        {"step": 0, "eval/a/b/accuracy": 0.1},
        {"step": 1},
        {"step": 2, "eval/a/b/accuracy": 0.4},
        {"step": 3, "eval/a/b/accuracy": None},
    ]
    assert before_and_after(lines) == ({"a/b": 0.1}, {"a/b": 0.4})
    assert before_and_after(lines[:1]) == ({"a/b": 0.1}, {})
    assert before_and_after([]) == ({}, {})


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (-0.021, 0.013, [-0.02, -0.01, 0, 0.01]), (0, 60, [0, 20, 40, 60])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.31234, "0.312"), (-0.02, "-0.02"), (1e-3, "1e-3"), (2.75e-06, "2.75e-6"), (1234, "1234"), (123456, "123k")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_shares_are_percent() -> None:
    assert [percent(v) for v in (0, 0.0025, 0.8789, 1)] == ["0%", "0.25%", "87.9%", "100%"]


def coordinates(svg: str) -> list[float]:
    return [float(v) for d in re.findall(r' d="([^"]*)"', svg) for v in re.findall(r"-?\d+\.?\d*", d)]


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1.0, None, 2.0], [None, 3.0, None], [-1e9, 1e-9, 1e9], [1e-300, 1e300]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float | None], log: bool) -> None:
    if log and not any(v is not None and v > 0 for v in values):
        values = [*values, 1.0]
    svg = line_chart([Series("s", range(len(values)), values)], log=log)
    assert "nan" not in svg and "inf" not in svg
    assert all(-1 <= c <= 400 for c in coordinates(svg))


def test_a_line_is_broken_where_a_value_is_missing() -> None:
    svg = line_chart([Series("s", range(5), [1.0, 2.0, None, 3.0, 2.0])])
    path = re.search(r'class="line c0" d="([^"]*)"', svg)
    assert path and path[1].count("M") == 2 and path[1].count("L") == 2
    assert line_chart([Series("s", range(3), [1.0, None, 2.0])]).count("<circle") == 2  # lone values are dots


def test_a_threshold_is_drawn_where_it_is_in_view() -> None:
    series = [Series("s", range(2), [0.01, 0.09])]
    assert "limit" in line_chart(series, threshold=0.05)
    assert "limit" not in line_chart(series, threshold=5.0)


def test_stacked_areas_add_up_to_the_axis() -> None:
    svg = stacked_chart([Series("a", range(1, 4), [1.0, 1.0, None]), Series("b", range(1, 4), [2.0, 3.0, 4.0])])
    assert svg.count('class="area') == 2
    assert Axis.around([3.0, 4.0, 4.0], log=False, bounds=(0.0, None)).low == 0
    first, second = re.findall(r'class="area c\d" d="M([^"]*)Z"', svg)
    top_of_first, bottom_of_second = first.split("L")[:6], second.split("L")[6:]
    assert top_of_first == bottom_of_second[::-1]  # the second area stands on the first
