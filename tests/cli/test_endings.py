"""What the last line of a command says, and with which code it exits."""

import errno
import os
import re
from pathlib import Path

import pytest

from slime.cli.endings import disk_full, exiting
from slime.config.exits import ConfigError, GateStopped, NotFinite, NothingToDo, PreflightError, SavedRunAgain, StoppedAtOnce


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended, exiting():
        raise error
    return int(str(ended.value.code)), capsys.readouterr().err


def test_a_full_disk_names_the_file_the_room_and_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "gone" / "iter_0000003.tmp" / "state.json"
    code, err = ending(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)), capsys)
    says = rf"slime: {file}: No space left on device; free: [\d.]+ GB in {tmp_path}; make room there .*the same command goes on from"
    assert code == 1 and re.match(says, err)


def test_a_full_disk_behind_another_error_shows(capsys: pytest.CaptureFixture[str]):
    """A write that failed does not know its file, and whoever was told raises an error of its own."""
    lost = RuntimeError("waiting for the trainer to save: a rank failed")
    lost.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    code, err = ending(lost, capsys)
    assert code == 1 and re.match(
        rf"slime: Disk quota exceeded; free: [\d.]+ GB in {os.getcwd()}, .*GB in /dev/shm \(a quota may allow less\); make", err
    )


def test_other_errors_say_what_they_said(capsys: pytest.CaptureFixture[str]):
    assert disk_full(OSError(errno.EACCES, "no")) is None and disk_full(RuntimeError("x")) is None
    assert ending(FileNotFoundError(2, "No such file", "x"), capsys) == (1, "slime: [Errno 2] No such file: 'x'\n")
    assert ending(NotFinite("update 3: the loss is nan"), capsys) == (5, "slime: update 3: the loss is nan\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ValueError("x"), 2),
        (PreflightError("x"), 3),
        (NothingToDo("x"), 4),
        (GateStopped("x"), 5),
        (SavedRunAgain("x"), 75),
        (TimeoutError("x"), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_every_ending_has_its_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert ending(error, capsys) == (code, "slime: x\n")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    found, err = ending(error, capsys)
    assert found == code and "in ending" in err and err.endswith("slime: x\n")


@pytest.mark.parametrize("code", [75, 143])
def test_a_run_that_was_ended_at_once_says_what_is_kept(code: int, capsys: pytest.CaptureFixture[str]):
    assert ending(StoppedAtOnce("ended at once by SIGTERM", code), capsys) == (code, "slime: ended at once by SIGTERM\n")


def test_ctrl_c_before_a_run_has_begun(capsys: pytest.CaptureFixture[str]):
    assert ending(KeyboardInterrupt(), capsys) == (130, "slime: interrupted\n")
