"""Which curves a report shows. A chart whose metrics no step has is left out."""

import math
from collections.abc import Callable
from html import escape

from slime.observe import curves
from slime.observe.charts import LARGE, SMALL, Frame, Series, line_chart, number, percent, stacked_chart
from slime.observe.console_table import seconds
from slime.observe.curves import FROM_0, Curve
from slime.observe.report_data import RunRecord

MAX_LINES = 6  # colours of the page
SAME = 1e-5  # relative difference up to which two metrics are drawn once
EVALUATION = (  # metric of a set, title, note
    ("accuracy", "Evaluation accuracy", ""),
    ("avg_at_k", "Evaluation avg@k", "mean reward of all k answers"),
    ("pass_at_k", "Evaluation pass@k", "one of k answers has a reward of 1"),
)
AXIS = '<div class="note" style="margin: 0; text-align: center">update</div>'


def learning(run: RunRecord) -> str:
    """Accuracy on every evaluation set, and the reward: what a run is for."""
    return "".join([*evaluations(run, *EVALUATION[0]), mean_reward(run), *(c for e in EVALUATION[1:] for c in evaluations(run, *e))])


def evaluations(run: RunRecord, metric: str, title: str, note: str) -> list[str]:
    """A metric of every evaluation set, as many charts as their colours need."""
    known = run.config.get("data", {}).get("eval") or {}
    series = []
    for name in run.names("eval/", f"/{metric}"):
        k = known[name].get("samples") if metric != "accuracy" and name in known else None
        if s := run.series(f"eval/{name}/{metric}", f"{name}, k = {k}" if k else name, markers=True):
            series.append(s)
    charts = [series[i : i + MAX_LINES] for i in range(0, len(series), MAX_LINES)]
    parts = [f"{title}, {i} of {len(charts)}" if len(charts) > 1 else title for i in range(1, len(charts) + 1)]
    return [
        card(part, sets, line_chart(sets, LARGE, write=percent, bounds=FROM_0), percent, note)
        for part, sets in zip(parts, charts, strict=True)
    ]


def mean_reward(run: RunRecord) -> str:
    """The mean reward of a batch, and of each source where there are several."""
    return with_parts(run, "Mean reward", ("reward/mean", "mean"), "reward/", "/mean", "sources", LARGE)


def from_teachers(run: RunRecord) -> str:
    """How far the student is from what it learns from, and from each teacher where there are several."""
    return with_parts(run, "KL(student, teacher)", ("distill/reverse_kl", "mean"), "distill/", "/reverse_kl", "teachers", SMALL)


def with_parts(run: RunRecord, title: str, whole: tuple[str, str], prefix: str, suffix: str, parts: str, frame: Frame) -> str:
    """One card of a (metric, label), and of the metrics of its `parts`, which stand between prefix and suffix; "" where there is none."""
    names = run.names(prefix, suffix)
    shown = {f"{prefix}{n}{suffix}": n for n in names[: MAX_LINES - 1]}
    metric, label = whole
    series = [s for m, name in {metric: "all" if shown else label, **shown}.items() if (s := run.series(m, name))]
    note = f"{len(shown)} of {len(names)} {parts}, the others are in metrics.jsonl" if len(names) > len(shown) else ""
    return card(title, series, line_chart(series, frame), number, note) if series else ""


def groups(run: RunRecord) -> list[tuple[str, str]]:
    """(heading, cards) of every other group of curves that has any."""
    shown = [
        ("Responses", several(run, curves.RESPONSES)),
        ("Optimisation", several(run, curves.OPTIMISATION)),
        ("Critic", several(run, curves.CRITIC)),
        ("Distillation", from_teachers(run) + several(run, curves.DISTILLATION)),
        ("Off-policy", several(run, curves.OFF_POLICY)),
        ("Trainer and engine", several(run, curves.TRAINER_AND_ENGINE)),
        ("Time", times(run) + several(run, curves.SPEEDS)),
        ("Weight sync", several(run, curves.SYNC)),
    ]
    return [(heading, cards) for heading, cards in shown if cards]


def several(run: RunRecord, specs: tuple[Curve, ...]) -> str:
    """The cards of these, those that have any values."""
    return "".join(curve(run, spec) for spec in specs)


def curve(run: RunRecord, spec: Curve) -> str:
    """One card, "" where no step has a value to draw."""
    series = [s for metric, label in spec.metrics if (s := run.series(metric, label))]
    drawable = [s for s in series if not spec.log or any(v is not None and v > 0 for v in s.values)]
    if not drawable or (spec.if_any and not any(v for s in drawable for v in s.values)):
        return ""
    if spec.unless_as and _same(drawable[0], run.series(spec.unless_as)):
        return ""
    limit = run.config.get("observe", {}).get(spec.limit) if spec.limit else None
    svg = line_chart(drawable, log=spec.log, bounds=spec.bounds, write=spec.write, threshold=limit)
    return card(spec.title, drawable, svg, spec.write, spec.note)


def times(run: RunRecord) -> str:
    """Where the seconds of a step go."""
    steps = range(1, len(run.lines))
    named = {n: [run.lines[k].get(f"time/{n}_s") for k in steps] for n in ("rollout", "train", "sync", "eval", "save")}
    series = [Series(n, list(steps), values) for n, values in named.items() if any(values)]
    if not series:
        return ""
    overlap = run.config.get("rollout", {}).get("mode", "sync") != "sync"
    return card(
        "Seconds of a step", series, stacked_chart(series, write=seconds), seconds, "rollout runs beside training" if overlap else ""
    )


def card(title: str, series: list[Series], svg: str, write: Callable[[float], str], note: str = "") -> str:
    """A titled chart with its legend and the newest values."""
    newest = [next((v for v in reversed(s.values) if v is not None), None) for s in series]
    legend = "".join(
        f'<span class="key"><i class="c{i}"></i>{escape(s.name)} <b>{"" if v is None else escape(write(v))}</b></span>'
        for i, (s, v) in enumerate(zip(series, newest, strict=True))
    )
    remark = f'<span class="note">{escape(note)}</span>' if note else ""
    caption = f'<figcaption><h3>{escape(title)}{remark}</h3><div class="legend">{legend}</div></figcaption>'
    return f'<figure class="card">{caption}<div>{svg}{AXIS}</div></figure>'


def _same(a: Series, b: Series | None) -> bool:
    """Whether both have the same values, but for the last digits of a sum."""
    if b is None or list(a.steps) != list(b.steps):
        return False
    pairs = zip(a.values, b.values, strict=True)
    return all(x == y or (x is not None and y is not None and math.isclose(x, y, rel_tol=SAME)) for x, y in pairs)
