"""Tidies up after a Ray on this host once its driver closes the pipe, which the kernel does for a driver that was killed.

Run as a process of its own: `python reaper.py SCRATCH LOGS`. Ray's processes end with their driver, but two of its agents try for
minutes to reach the dead cluster first; what still lives after a moment is killed here. Standard library only.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "SLIME_RAY"  # environment variable, inherited by every process of one Ray: the name of its scratch directory
PATIENCE_S = 3.0  # for processes to end by themselves
KILL_S = 30.0  # for killed ones to go: the kernel keeps a process that waits for a device


def main(scratch: Path, logs: Path) -> None:
    """Wait for the driver to go, end what it left, put the logs where the link to them stands, remove the scratch directory."""
    sys.stdin.buffer.read()
    mark = f"{MARK}={scratch.name}".encode()
    give_up = time.monotonic() + PATIENCE_S
    while any(living(mark)) and time.monotonic() < give_up:
        time.sleep(0.1)
    give_up = time.monotonic() + KILL_S
    while (left := list(living(mark))) and time.monotonic() < give_up:
        for process in left:
            kill(process)
        time.sleep(0.1)
    if logs.is_symlink():
        target = logs.readlink()
        logs.unlink()
        shutil.copytree(target, logs, symlinks=True)
    shutil.rmtree(scratch, ignore_errors=True)


def living(mark: bytes) -> Iterator[int]:
    """Ids of the processes that carry the mark; another user's processes cannot be read and are not ours."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mark in environment.split(b"\0"):
                yield int(folder.name)


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
