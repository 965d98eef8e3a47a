"""What a report is made of: the files of a run's directory, read leniently where a crash may have left them short."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slime.observe import density
from slime.observe.charts import Series
from slime.observe.density import Density
from slime.observe.density_cells import Cell, cell_of
from slime.observe.metrics import Line, read
from slime.observe.report_examples import Example, read_examples
from slime.observe.summary import Summary, read_summary


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it."""

    name: str
    lines: list[Line]  # entry k is step k
    summary: Summary | None  # None where the run goes on or was killed
    config_text: str
    config: dict[str, Any]
    examples: list[Example]
    ledger: dict[str, int]  # drawn, trained, dropped, pending; {} where not known
    density: Density[Cell] | None  # None where no version of the weights was recorded

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Read a run's directory. Raises ValueError where metrics.jsonl, config.yaml or density.jsonl is damaged; any may be missing."""
        metrics, config, changes = run_dir / "metrics.jsonl", run_dir / "config.yaml", run_dir / density.NAME
        lines = read(metrics) if metrics.exists() else []
        text = config.read_text() if config.exists() else ""
        loaded = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
        return cls(
            name=run_dir.resolve().name,
            lines=lines,
            summary=read_summary(run_dir),
            config_text=text,
            config={str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {},
            examples=read_examples(run_dir / "examples.jsonl"),
            ledger=_read_ledger(run_dir / "ledger.json", lines),
            density=density.read_merged(changes, cell_of) if changes.exists() else None,
        )

    @property
    def supervised(self) -> bool:
        """Whether it trains on examples, which nobody answers and nobody judges: by its updates, before the first by its recipe."""
        if len(self.lines) > 1:
            return not any("reward/mean" in line for line in self.lines)
        return self.config.get("algorithm", {}).get("name") == "sft"

    def series(self, metric: str, name: str = "", *, markers: bool = False) -> Series | None:
        """The values of a metric over all steps (with `markers` only where it has one); None where no step has one."""
        steps = [(k, line.get(metric)) for k, line in enumerate(self.lines)]
        known = [k for k, value in steps if value is not None]
        if not known:
            return None
        shown = [(k, v) for k, v in steps if (v is not None if markers else k >= known[0])]
        return Series(name or metric, [k for k, _ in shown], [v for _, v in shown], markers)

    def names(self, prefix: str, suffix: str) -> list[str]:
        """What stands between `prefix` and `suffix` in the metric names, sorted."""
        found = {n for line in self.lines for n in line if n.startswith(prefix) and n.endswith(suffix)}
        return sorted(n[len(prefix) : len(n) - len(suffix)] for n in found if len(n) > len(prefix) + len(suffix))

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return next((v for line in reversed(self.lines) if (v := line.get(metric)) is not None), None)


def _read_ledger(path: Path, lines: Sequence[Line]) -> dict[str, int]:
    """The counts of ledger.json, by default those of the newest line of metrics."""
    values = json.loads(path.read_bytes()) if path.exists() else (lines[-1] if lines else {})
    return {n.removeprefix("ledger/"): int(v) for n, v in values.items() if n.startswith("ledger/") and v is not None}
