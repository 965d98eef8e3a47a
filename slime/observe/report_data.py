"""What a report is made of: the files of a run's directory, read leniently where a crash may have left them short."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slime.observe import account as accounts
from slime.observe import density
from slime.observe.account import Account, account
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
    ledger: dict[str, int]  # drawn, trained, dropped, pending, by the newest line of metrics; {} where not known
    account: Account | str | None  # of every prompt by its ordinal; what is wrong with it; None where it was not kept
    density: Density[Cell] | None  # None where no version of the weights was recorded

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Read a run's directory. Raises ValueError where metrics.jsonl, config.yaml, density.jsonl or a line of ledger.jsonl is damaged;
        any may be missing."""
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
            ledger={n.removeprefix("ledger/"): int(v) for n, v in (lines or [{}])[-1].items() if n.startswith("ledger/") and v is not None},
            account=_read_account(run_dir / accounts.NAME, len(lines) - 1),
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


def _read_account(path: Path, updates: int) -> Account | str | None:
    """The account of the first `updates` updates, or why there is none: a crash may have left one line more than metrics.jsonl has."""
    if not path.exists():
        return None
    lines = accounts.read(path)
    if len(lines) < updates:
        return f"{accounts.NAME} ends at update {len(lines)} of {updates}"
    try:
        return account(lines[:updates])
    except ValueError as error:
        return str(error)
