"""The columns of a step's line: which metric, how wide, how it is written. Fits 100 characters."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slime.observe.summary import accuracies


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    metric: str
    write: Callable[[float], str]


def short(value: float) -> str:
    """A count in at most five characters: 812, 9.8k, 123k, 4.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if abs(scaled) < 99.5 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def seconds(value: float) -> str:
    """A duration in at most six characters: 0.12s, 34.5s, 1234s."""
    return f"{value:.2f}s" if value < 10 else f"{value:.1f}s" if value < 1000 else f"{value:.0f}s"


COLUMNS = (
    Column("reward", 7, "reward/mean", "{:.3f}".format),
    Column("len", 6, "response_len/mean", short),
    Column("cut", 5, "response_len/truncated_frac", "{:.0%}".format),
    Column("mismatch", 8, "mismatch/logprob_abs_diff", "{:.1e}".format),
    Column("grad", 7, "train/grad_norm", "{:.3g}".format),
    Column("lr", 7, "train/lr", "{:.1e}".format),
    Column("rollout", 7, "time/rollout_s", seconds),
    Column("train", 6, "time/train_s", seconds),
    Column("sync", 6, "time/sync_s", seconds),
    Column("tok/s", 5, "perf/tokens_per_s", short),
)


class Columns:
    """Writes the header and the rows of one run."""

    def __init__(self, steps: int) -> None:
        self._total = f"/{steps}" if steps < 1000 else ""
        self._step_width = max(5, len(str(steps)) + len(self._total))
        self._eval_title = "eval"

    def header(self, metrics: Mapping[str, float]) -> str:
        """The titles. The evaluation column is named after the set; with several it is their mean."""
        self._name_eval(metrics)
        first, *rest = COLUMNS
        cells = [f"{'step':>{self._step_width}}", f"{first.title:>{first.width}}", f"{self._eval_title[:7]:>7}"]
        return "  ".join(cells + [f"{c.title:>{c.width}}" for c in rest])

    def row(self, step: int, metrics: Mapping[str, float]) -> str:
        """One step; a metric that is not there leaves its cell blank, one that is not finite is written as it is."""
        first, *rest = COLUMNS
        accuracy = accuracies(dict(metrics))
        score = f"{sum(accuracy.values()) / len(accuracy):.1%}" if accuracy else ""
        cells = [f"{f'{step}{self._total}':>{self._step_width}}", self._cell(first, metrics), f"{score:>7}"]
        return "  ".join(cells + [self._cell(c, metrics) for c in rest]).rstrip()

    def _name_eval(self, metrics: Mapping[str, float]) -> None:
        sets = list(accuracies(dict(metrics)))
        if sets:
            self._eval_title = sets[0] if len(sets) == 1 else "evals"

    def _cell(self, column: Column, metrics: Mapping[str, float]) -> str:
        value = metrics.get(column.metric)
        if value is None:
            return " " * column.width
        text = column.write(value) if math.isfinite(value) else str(value)
        return f"{text:>{column.width}}"
