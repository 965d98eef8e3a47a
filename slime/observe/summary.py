"""summary.json: how a run ended, for scripts, the closing panel and the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from slime.observe.files import write_atomic
from slime.observe.metrics import Line

NAME = "summary.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run."""

    status: str  # done | stopped | failed | saved
    steps: int  # completed updates
    wall_s: float  # over all restarts
    eval_before: dict[str, float] = field(default_factory=dict)  # evaluation set -> accuracy at step 0
    eval_after: dict[str, float] = field(default_factory=dict)  # the same, at the last evaluation
    paths: dict[str, str] = field(default_factory=dict)  # report, checkpoint, hf, metrics, ...
    reason: str = ""  # why a run stopped or failed


def write_summary(run_dir: Path, summary: Summary) -> None:
    """Write summary.json."""
    write_atomic(run_dir / NAME, json.dumps(asdict(summary), indent=1) + "\n")


def read_summary(run_dir: Path) -> Summary | None:
    """The summary, None where the run has not ended (or was killed)."""
    path = run_dir / NAME
    return Summary(**json.loads(path.read_bytes())) if path.exists() else None


def accuracies(line: Line) -> dict[str, float]:
    """Evaluation set -> accuracy, of one line of metrics.jsonl."""
    names = [n for n in line if n.startswith("eval/") and n.endswith("/accuracy")]
    return {n.split("/", 1)[1].rsplit("/", 1)[0]: v for n in names if (v := line[n]) is not None}


def before_and_after(lines: Sequence[Line]) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies before the first update and at the last evaluation after one; {} where there was none."""
    evaluated = [found for line in lines[1:] if (found := accuracies(line))]
    return (accuracies(lines[0]) if lines else {}), (evaluated[-1] if evaluated else {})
