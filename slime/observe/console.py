"""What a run shows on stdout: one line a step, bars for what is under way, a closing panel.

On a terminal the bars live below the table; in a pipe or a file there are plain lines only. Everything else that a run has
to say (libraries, Ray, engines) goes to files of the run directory.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from slime.observe.console_table import Columns
from slime.observe.summary import Summary

REPEAT_HEADER = 20  # steps between two headers
ENDINGS = {  # status of a summary -> colour, words
    "done": ("green", "done"),
    "stopped": ("yellow", "stopped"),
    "failed": ("red", "failed"),
    "saved": ("cyan", "saved, run me again"),
}


@dataclass(slots=True)
class Bar:
    """Progress of one thing under way; does nothing where there are no bars."""

    progress: Progress | None
    task: TaskID

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished; `note` stands behind the bar."""
        if self.progress:
            self.progress.update(self.task, completed=done, note=note)


class Console:
    """The one writer of stdout. Threads may share it."""

    def __init__(self, *, steps: int, out: RichConsole | None = None) -> None:
        """`steps`: updates of the whole run. There are bars where `out` (stdout) is a terminal."""
        self.out = out or RichConsole(highlight=False)
        self.columns = Columns(steps)
        self._rows = 0
        self._progress = self._bars() if self.out.is_terminal else None

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("  [bold]{task.description:<18}"),
            BarColumn(bar_width=36, complete_style="cyan", finished_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.out,
            transient=True,
            refresh_per_second=4,
        )

    def start(self, title: str, facts: Mapping[str, str]) -> None:
        """Say what is run: a title and a few named facts (model, data, devices, directory)."""
        self._line(Text(title, style="bold"))
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self._line(Text.assemble("  ", (f"{name:<{width}}", "dim"), "  ", value))
        self._line(Text())
        if self._progress:
            self._progress.start()

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None, unit: str = "") -> Iterator[Bar]:
        """A bar while the block runs: `with console.bar("rollout 12", 256, "answers") as bar: ... bar.update(17)`. Without a total it
        pulses beside the time."""
        if not self._progress:
            yield Bar(None, TaskID(0))
            return
        task = self._progress.add_task(what, total=total, note=unit)
        try:
            yield Bar(self._progress, task)
        finally:
            self._progress.remove_task(task)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for update `step` and the evaluation after it; the metrics as in metrics.jsonl."""
        if self._rows % REPEAT_HEADER == 0:
            self._line(Text(self.columns.header(metrics), style="bold"))
        self._rows += 1
        self._line(Text(self.columns.row(step, metrics)))

    def note(self, text: str) -> None:
        """One plain line, such as `saved iter_0000010`."""
        self._line(Text(text, style="dim"))

    def warning(self, text: str) -> None:
        """One line that stands out."""
        self._line(Text(f"warning: {text}", style="yellow"))

    def close(self, summary: Summary) -> None:
        """Stop the bars and say how the run ended: accuracy before and after, and where everything lies. The reason too, but where the
        command's last line on stderr, `slime: <reason>`, comes to the same place."""
        self.stop()
        self._line(Text())
        body = Group(*self._accuracy(summary), *_places(summary.paths))
        colour, label = ENDINGS[summary.status]
        minutes, seconds = divmod(round(summary.wall_s), 60)
        title = f"{label}: {summary.steps} updates in {minutes} min {seconds:02d} s"
        if self.out.is_terminal:
            self.out.print(Panel(body, title=title, title_align="left", border_style=colour, padding=(0, 1), expand=False))
        else:
            self._line(Text(title))
            self.out.print(body, soft_wrap=True)

    def stop(self) -> None:
        """Take the bars away and leave the terminal as it was; may be called twice."""
        if self._progress:
            self._progress.stop()

    def _accuracy(self, summary: Summary) -> list[Text]:
        lines = [Text(summary.reason, style="red")] if summary.reason and not _same_place(self.out.file, sys.stderr) else []
        for name, after in summary.eval_after.items():
            before = summary.eval_before.get(name)
            change = "" if before is None else f"{before:.1%} -> {after:.1%}  ({100 * (after - before):+.1f} points)"
            lines.append(Text.assemble((f"accuracy on {name}  ", "bold"), (change or f"{after:.1%}", "bold green")))
        return lines

    def _line(self, text: Text) -> None:
        self.out.print(text, soft_wrap=True)


def _same_place(a: IO[str], b: IO[str]) -> bool:
    """Whether both write to one terminal, pipe or file; False for what is none of them."""
    try:
        return os.path.sameopenfile(a.fileno(), b.fileno())
    except (OSError, ValueError):
        return False


def _places(paths: Mapping[str, str]) -> list[Text]:
    width = max(map(len, paths), default=0)
    return [Text.assemble((f"{name:<{width}}  ", "dim"), path, overflow="fold") for name, path in paths.items()]
