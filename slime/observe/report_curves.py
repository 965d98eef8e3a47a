"""Which curves a report shows. A chart whose metrics no step has is left out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from slime.observe.charts import LARGE, Series, line_chart, number, percent, stacked_chart
from slime.observe.console_table import seconds, short
from slime.observe.report_data import RunRecord

MAX_LINES = 6  # colours of the page
SAME = 1e-5  # relative difference up to which two metrics are drawn once
EVALUATION = (  # metric of a set, title, note
    ("accuracy", "Evaluation accuracy", ""),
    ("avg_at_k", "Evaluation avg@k", "mean reward of all k answers"),
    ("pass_at_k", "Evaluation pass@k", "one of k answers has a reward of 1"),
)
AXIS = '<div class="note" style="margin: 0; text-align: center">update</div>'


@dataclass(frozen=True, slots=True)
class Curve:
    """A line chart: (metric, label) pairs."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    log: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    write: Callable[[float], str] = number
    limit: str = ""  # a knob of `observe` drawn as a dashed line
    note: str = ""
    if_any: bool = False  # left out where all values are 0
    unless_as: str = ""  # left out where its values are those of this metric


FROM_0 = (0.0, None)
SYNC = (
    Curve("Changed weights", (("sync/density", "of all elements"),), log=True, write=percent),
    Curve("Bytes on the wire", (("sync/wire_bytes", "of a version"),), log=True, write=short),
    Curve("Compression", (("sync/ratio", "weights / bytes sent"),), log=True),
    Curve(
        "Seconds of a sync",
        tuple((f"sync/{name}_s", name) for name in ("diff", "encode", "stage", "pause", "commit", "verify")),
        log=True,
        note="engines stand still during pause",
    ),
)
GROUPS: tuple[tuple[str, tuple[Curve, ...]], ...] = (
    (
        "Responses",
        (
            Curve("Response length", (("response_len/mean", "mean"), ("response_len/max", "longest")), note="tokens"),
            Curve("Truncated responses", (("response_len/truncated_frac", "share"),), bounds=FROM_0, write=percent),
            Curve("Groups of equal rewards", (("group/zero_std_frac", "share"),), bounds=FROM_0, write=percent),
            Curve("Reward errors", (("reward/error_frac", "share"),), bounds=FROM_0, write=percent, if_any=True),
        ),
    ),
    (
        "Optimisation",
        (
            Curve("Entropy", (("train/entropy", "nats a token"),)),
            Curve("Policy loss", (("train/pg_loss", "loss"),)),
            Curve("Loss", (("train/loss", "loss"),), unless_as="train/pg_loss"),
            Curve("Gradient norm", (("train/grad_norm", "before clipping"),), bounds=FROM_0),
            Curve("Clipped tokens", (("train/clip_frac", "share"),), bounds=FROM_0, write=percent),
            Curve("KL of the update", (("train/kl", "k3 estimate"),), if_any=True),
            Curve("Learning rate", (("train/lr", "lr"),), bounds=FROM_0),
        ),
    ),
    (
        "Trainer and engine",
        (
            Curve(
                "Log-prob difference",
                (
                    ("mismatch/logprob_abs_diff", "mean"),
                    ("mismatch/logprob_abs_diff_max", "largest"),
                    ("mismatch/logprob_abs_diff_without_replay", "mean without replay"),
                ),
                log=True,
                limit="mismatch_warn",
                note="same tokens, same weights",
            ),
            Curve("KL(engine, trainer)", (("mismatch/kl", "k3 estimate"),), log=True, note="same tokens, same weights"),
            Curve(
                "Experts that replay changed",
                (("mismatch/experts_changed_frac", "of tokens x layers"),),
                bounds=FROM_0,
                write=percent,
                if_any=True,
            ),
            Curve("Prefix cache hits", (("engine/cache_hit", "of prompt tokens"),), bounds=(0.0, 1.0), write=percent),
            Curve("Staleness", (("staleness/mean", "mean"), ("staleness/max", "largest")), bounds=FROM_0, note="versions", if_any=True),
            Curve("KL(rollout, trainer)", (("offpolicy/kl", "k3 estimate"),), log=True, note="whole batch, weights as they drew it"),
            Curve("Effective sample size", (("offpolicy/ess", "of the batch's tokens"),), bounds=(0.0, 1.0), write=percent),
        ),
    ),
)


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
    names = run.names("reward/", "/mean")
    sources = {f"reward/{n}/mean": n for n in names[: MAX_LINES - 1]}
    means = {"reward/mean": "all" if sources else "mean", **sources}
    rewards = [s for metric, name in means.items() if (s := run.series(metric, name))]
    note = f"{len(sources)} of {len(names)} sources, the others are in metrics.jsonl" if len(names) > len(sources) else ""
    return card("Mean reward", rewards, line_chart(rewards, LARGE), number, note) if rewards else ""


def groups(run: RunRecord) -> list[tuple[str, str]]:
    """(heading, cards) of every other group of curves that has any."""
    shown = [(heading, "".join(curve(run, c) for c in curves)) for heading, curves in GROUPS]
    shown.append(("Time", times(run) + speeds(run)))
    shown.append(("Weight sync", "".join(curve(run, c) for c in SYNC)))
    return [(heading, cards) for heading, cards in shown if cards]


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


def speeds(run: RunRecord) -> str:
    """Throughput, and the share of a step in which nothing computes."""
    return "".join(
        curve(run, spec)
        for spec in (
            Curve(
                "Tokens per second",
                (("perf/tokens_per_s", "trained"), ("engine/tokens_per_s", "generated")),
                bounds=FROM_0,
                write=short,
            ),
            Curve("Tokens per second and GPU", (("perf/tokens_per_s_per_gpu", "trained"),), bounds=FROM_0, write=short),
            Curve("Model FLOPs utilisation", (("perf/mfu", "of the bf16 peak"),), bounds=FROM_0, write=percent),
            Curve("Peak GPU memory", (("perf/gpu_mem_gb", "GB, trainer"),), bounds=FROM_0),
            Curve("Idle share of a step", (("time/idle_frac", "nothing computes"),), bounds=FROM_0, write=percent),
        )
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
