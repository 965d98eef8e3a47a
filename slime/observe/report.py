"""report.html: a run on one page that needs nothing but a browser. Reads the files of a run's directory, whatever of them is there.

Sources: metrics.jsonl, summary.json, config.yaml, examples.jsonl (one JSON object a line: step, prompt, response, reward,
label, source), ledger.jsonl, density.jsonl.
"""

from html import escape
from pathlib import Path

from slime.observe import report_curves
from slime.observe.account import Account
from slime.observe.charts import number, percent
from slime.observe.console_table import short
from slime.observe.files import write_atomic
from slime.observe.page import page
from slime.observe.report_data import RunRecord
from slime.observe.report_density import changed_weights
from slime.observe.report_samples import before_after_table, samples
from slime.observe.summary import before_and_after

NAME = "report.html"
PILLS = {"done": ("good", "done"), "stopped": ("warn", "stopped"), "failed": ("bad", "failed"), "saved": ("warn", "saved, to be resumed")}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html (atomically) and return its path. Raises ValueError where a file is damaged."""
    run = RunRecord.read(run_dir)
    path = run_dir / NAME
    write_atomic(path, page(f"{run.name} · slime", render(run)))
    return path


def render(run: RunRecord) -> str:
    """The body of the page."""
    sections = [header(run), scores(run), facts(run)]
    curves = report_curves.learning(run)
    if curves:
        sections.append(f'<h2>Learning</h2><div class="grid two">{curves}</div>')
    for heading, cards in report_curves.groups(run):
        sections.append(f'<h2>{escape(heading)}</h2><div class="grid">{cards}</div>')
    sections += [changed_weights(run.density)] if run.density else []
    sections += [before_after_table(run.examples), samples(run.examples, judged=not run.supervised), ledger(run), files(run)]
    return "\n".join(s for s in sections if s)


def header(run: RunRecord) -> str:
    """Name, status and recipe; the reason where a run did not end well."""
    kind, label = PILLS[run.summary.status] if run.summary else ("", "no ending recorded: still going on, or killed")
    reason = f'<p class="reason">{escape(run.summary.reason)}</p>' if run.summary and run.summary.reason else ""
    title = f'<div class="title"><h1>{escape(run.name)}</h1><span class="pill {kind}">{escape(label)}</span></div>'
    return f'<header>{title}<p class="sub">{escape(recipe(run))}</p>{reason}</header>'


def recipe(run: RunRecord) -> str:
    """The recipe in one line."""
    config = {f"{group}.{name}": value for group, knobs in run.config.items() if isinstance(knobs, dict) for name, value in knobs.items()}
    batch = "{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} answers an update"
    parts = [
        "{model.path}, {model.dtype}",
        "{algorithm.name}",
        "{rollout.prompts_per_step} examples an update" if run.supervised else batch,
        "lr {trainer.lr}",
        *([] if run.supervised else ["{rollout.mode}"]),
        "seed {run.seed}",
    ]
    names = [[piece.split("}")[0] for piece in part.split("{")[1:]] for part in parts]
    filled = []
    for part, needed in zip(parts, names, strict=True):
        if all(config.get(n) is not None for n in needed):
            for name in needed:
                part = part.replace("{" + name + "}", str(config[name]))
            filled.append(part)
    return " · ".join(filled)


def scores(run: RunRecord) -> str:
    """Accuracy before and after, the largest thing on the page."""
    before, after = before_and_after(run.lines)
    cards = []
    for name in sorted({*before, *after}):
        first, last = before.get(name), after.get(name)
        shown = first if last is None else last
        assert shown is not None
        start = f"<s>{percent(first)} →</s>" if first is not None and last is not None else ""
        change = ""
        if first is not None and last is not None:
            kind = "good" if last > first else "bad" if last < first else ""
            change = f'<span class="pill {kind}">{100 * (last - first):+.1f} points</span>'
        what = "accuracy on" if last is not None else "accuracy before the first update on"
        cards.append(
            f'<div class="card score"><span class="name">{what} <b>{escape(name)}</b></span>'
            f'<div class="values">{start}<b>{percent(shown)}</b>{change}</div></div>'
        )
    return f'<div class="scores">{"".join(cards)}</div>' if cards else ""


def facts(run: RunRecord) -> str:
    """A few numbers about the whole run."""
    steps = len(run.lines) - 1
    wall_s = run.summary.wall_s if run.summary else sum(line.get("time/step_s") or 0.0 for line in run.lines)
    speeds = [v for line in run.lines[1:] if (v := line.get("perf/tokens_per_s")) is not None]
    drifts = [v for line in run.lines[1:] if (v := line.get("mismatch/logprob_abs_diff")) is not None]
    reward = run.series("reward/mean")
    known = [v for v in reward.values if v is not None] if reward else []
    shown = {
        "updates": str(max(0, steps)),
        "wall time": duration(wall_s) if wall_s else "",
        "reward, first → last": f"{number(known[0])} → {number(known[-1])}" if known else "",
        "tokens per second": short(sum(speeds) / len(speeds)) if speeds else "",
        "log-prob difference, worst step mean": number(max(drifts)) if drifts else "",
    }
    cards = "".join(f'<div class="card fact"><span>{name}</span><b>{escape(value)}</b></div>' for name, value in shown.items() if value)
    return f'<div class="facts">{cards}</div>'


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def ledger(run: RunRecord) -> str:
    """What became of every prompt that was drawn, whether it adds up, and whether each was settled once."""
    if not {"drawn", "trained", "dropped", "pending"} <= run.ledger.keys():
        return ""
    drawn, pending = run.ledger["drawn"], run.ledger["pending"]
    counted = run.account if isinstance(run.account, Account) else None
    trained = counted.trained if counted else run.ledger["trained"]
    dropped = sum(counted.dropped.values()) if counted else run.ledger["dropped"]
    parts = [("trained", trained, 0), ("dropped", dropped, 1), ("pending", pending, 2)]
    accounted = trained + dropped + pending
    bars = "".join(f'<i class="c{i}" style="width:{100 * count / max(1, drawn):.3f}%"></i>' for _, count, i in parts)
    keys = "".join(f'<span class="key"><i class="c{i}"></i>{name} <b>{count:,}</b></span>' for name, count, i in parts)
    kind, verdict = ("good", "adds up") if drawn == accounted else ("bad", f"accounts for {accounted:,}")
    title = f'<h3>{drawn:,} prompts drawn = trained + dropped + pending</h3><span class="pill {kind}">{verdict}</span>{settled_once(run)}'
    shown = f'<div class="bar">{bars}</div><div class="legend">{keys}</div>{reasons(counted)}'
    return f'<h2>Ledger</h2><div class="card"><div class="title">{title}</div>{shown}</div>'


def settled_once(run: RunRecord) -> str:
    """Exactly once, counted prompt by prompt."""
    if run.account is None:
        return ""
    if isinstance(run.account, str):
        return f'<span class="pill bad">every prompt settled once: no</span><p class="reason">{escape(run.account)}</p>'
    return '<span class="pill good">every prompt settled once: yes</span>'


def reasons(counted: Account | None) -> str:
    """Why prompts were dropped."""
    if counted is None or not counted.dropped:
        return ""
    rows = "".join(f"<tr><td>{escape(reason)}</td><td>{count:,}</td></tr>" for reason, count in sorted(counted.dropped.items()))
    return f"<table><tr><th>dropped because</th><th>prompts</th></tr>{rows}</table>"


def files(run: RunRecord) -> str:
    """Where things lie, and the resolved recipe folded."""
    paths = run.summary.paths if run.summary else {}
    items = "".join(f'<dt>{escape(name)}</dt><dd class="text">{escape(path)}</dd>' for name, path in paths.items())
    where = f'<dl class="paths">{items}</dl>' if items else ""
    config = (
        f'<details><summary>Resolved recipe</summary><pre class="text">{escape(run.config_text)}</pre></details>' if run.config_text else ""
    )
    return f'<h2>Files</h2><div class="card">{where}{config}</div>' if where or config else ""
