import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from slime.observe import log as log_files
from slime.observe.console import REPEAT_HEADER, Console
from slime.observe.console_table import seconds, short
from slime.observe.summary import Summary

LINE = {
    "reward/mean": 0.4567,
    "response_len/mean": 12345.6,
    "response_len/truncated_frac": 0.031,
    "mismatch/logprob_abs_diff": 1.23e-6,
    "train/grad_norm": 0.98765,
    "train/lr": 1e-6,
    "time/rollout_s": 123.4,
    "time/train_s": 4.5,
    "time/sync_s": 0.06,
    "perf/tokens_per_s": 4200.0,
}


def console(steps: int = 60, *, terminal: bool = False, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    rich = RichConsole(file=out, force_terminal=terminal, width=width, highlight=False, legacy_windows=False)
    return Console(steps=steps, out=rich), out


def test_a_step_is_one_line_under_an_aligned_header() -> None:
    shown, out = console()
    shown.step(0, {"eval/heldout/accuracy": 0.3125})
    shown.step(1, LINE)
    shown.step(60, {**LINE, "eval/heldout/accuracy": 1.0, "train/grad_norm": math.nan})
    header, zero, one, last = out.getvalue().splitlines()
    assert header.split() == ["step", "reward", "heldout", "len", "cut", "mismatch", "grad", "lr", "rollout", "train", "sync", "tok/s"]
    assert zero.split() == ["0/60", "31.2%"]
    assert one.split() == ["1/60", "0.457", "12.3k", "3%", "1.2e-06", "0.988", "1.0e-06", "123.4s", "4.50s", "0.06s", "4.2k"]
    assert "100.0%" in last and "nan" in last
    for title, cell in (("step", "60/60"), ("reward", "0.457"), ("heldout", "100.0%"), ("lr", "1.0e-06"), ("tok/s", "4.2k")):
        assert header.index(title) + len(title) == last.index(cell) + len(cell), title
    assert all(len(line) <= 100 for line in (header, zero, one, last))


def test_long_runs_and_names_stay_within_100_characters() -> None:
    shown, out = console(steps=1_000_000)
    shown.step(999_999, {**LINE, "eval/a_very_long_name_of_a_set/accuracy": 0.5, "perf/tokens_per_s": 9.99e9})
    assert all(len(line) <= 100 for line in out.getvalue().splitlines())


def test_several_sets_show_their_mean_and_the_header_comes_again() -> None:
    shown, out = console()
    for step in range(2 * REPEAT_HEADER):
        shown.step(step, {"eval/a/accuracy": 0.2, "eval/b/accuracy": 0.4})
    lines = out.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, REPEAT_HEADER + 1]
    assert "evals" in lines[0] and "30.0%" in lines[1]


def test_a_pipe_gets_plain_lines_and_no_bars() -> None:
    shown, out = console(width=40)
    shown.start("slime quickstart", {"model": "some/very/long/path/" * 5, "data": "x"})
    with shown.bar("rollout 1", 8) as bar:
        bar.update(3)
    shown.step(1, LINE)
    shown.note("saved iter_0000001")
    shown.warning("no [bold]markup[/bold] here")
    shown.close(
        Summary("done", 60, 187.0, {"heldout": 0.31}, {"heldout": 0.88, "other": 0.5}, {"report": "/runs/x/report.html", "hf": "/x"})
    )
    text = out.getvalue()
    assert "\x1b" not in text and "rollout 1 " not in text
    assert "some/very/long/path/" * 5 in text  # not wrapped
    assert "warning: no [bold]markup[/bold] here\n" in text
    assert text.endswith(
        "done: 60 updates in 3 min 07 s\naccuracy on heldout  31.0% -> 88.0%  (+57.0 points)\naccuracy on other  50.0%\n"
        "report  /runs/x/report.html\nhf      /x\n"
    )


def test_a_terminal_gets_bars_that_go_away_and_a_panel() -> None:
    shown, out = console(terminal=True)
    shown.start("slime quickstart", {"model": "m"})
    with shown.bar("rollout 1", 8, "answers") as bar:
        bar.update(3, "1.2k tok/s")
        shown._progress.refresh()  # type: ignore[union-attr]
        assert re.search(r"rollout 1.*3/8.*1\.2k tok/s", out.getvalue())
        shown.step(1, LINE)
    before_close = len(out.getvalue())
    shown.close(Summary("failed", 1, 5.0, {}, {}, {"report": "/r"}, "engine 0 died"))
    end = out.getvalue()[before_close:]
    assert "failed: 1 updates" in end and "engine 0 died" in end and "╭" in end and "rollout 1" not in end
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back
    shown.stop()


def test_a_reason_that_stderr_tells_in_the_same_place_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slime train > log 2>&1` and a terminal, but not `slime train > log`."""
    ended = Summary("saved", 1, 5.0, {}, {}, {"report": "/r"}, "stopped by SIGTERM")
    for name, told in (("log", False), ("other", True)):
        with (tmp_path / "log").open("w") as out, (tmp_path / name).open("a") as err:
            monkeypatch.setattr(sys, "stderr", err)
            Console(steps=3, out=RichConsole(file=out)).close(ended)
        text = (tmp_path / "log").read_text()
        assert "saved, run me again: 1 updates" in text and "/r" in text and ("stopped by SIGTERM" in text) == told


def test_without_a_terminal_there_are_no_bars() -> None:
    shown, out = console()
    with shown.bar("rollout 1", 8) as bar:
        bar.update(3)
    assert out.getvalue() == ""


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (812.4, "812"), (999.6, "1.0k"), (9840, "9.8k"), (123_456, "123k"), (4.2e6, "4.2M")])
def test_counts_are_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.061, "0.06s"), (34.52, "34.5s"), (1234.5, "1234s")])
def test_durations_are_short(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [logging.StreamHandler(sys.stderr)]  # what a library left there
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def test_messages_go_to_a_file_and_warnings_also_to_the_console(tmp_path: Path, root_logger: logging.Logger, capfd) -> None:
    shown: list[str] = []
    path = log_files.set_up(tmp_path, shown.append)
    assert path == tmp_path / "logs" / "driver.log"
    logging.getLogger("slime.x").info("quiet")
    logging.getLogger("slime.x").warning("one line\nand %d more", 2)
    logging.getLogger("slime.x").debug("unheard")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a library's own", stacklevel=1)
    log_files.set_up(tmp_path, shown.append)  # once more: nothing is written twice
    logging.getLogger("slime.x").error("bad")
    text = path.read_text()
    assert shown == ["one line", "bad"]
    assert "INFO    slime.x: quiet" in text and "and 2 more" in text and "unheard" not in text and "a library's own" in text
    assert text.count(": bad") == 1
    assert capfd.readouterr() == ("", "")
