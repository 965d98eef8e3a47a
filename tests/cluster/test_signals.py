"""However the driver ends, nothing of the Ray that it started stays behind: processes are counted by a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DRIVER = """
import sys, time
from pathlib import Path
import ray
from slime.cli import main as cli
from slime.cli.endings import exiting
from slime.cluster.session import connect
from slime.config import SlimeConfig
import signal

@ray.remote
class Busy:
    def ready(self): return True
    def work(self): time.sleep(600)

signal.signal(signal.SIGTERM, cli._terminated)
with exiting(), connect(SlimeConfig(), Path(sys.argv[1])):
    busy = [Busy.remote() for _ in range(2)]
    ray.get([b.ready.remote() for b in busy])
    [b.work.remote() for b in busy]
    print("running", flush=True)
    time.sleep(600)
"""


def marked(mark: str) -> list[str]:
    """Command lines of living processes that carry the mark."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_stays_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    mark = f"SLIME_TEST_MARK={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env=os.environ | {name: value}, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert driver.stdout is not None and driver.stdout.readline() == "running\n"
    assert len(marked(mark)) > 5
    assert os.getpgid(driver.pid) == driver.pid
    driver.send_signal(number)
    assert driver.wait(30) == code
    give_up = time.monotonic() + 15
    while (left := marked(mark)) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert not left
    (logs,) = (tmp_path / "logs" / "ray").iterdir()
    assert logs.is_symlink() == (number == signal.SIGKILL)
    assert (logs / "raylet.out").is_file()


def test_next_start_collects_what_a_killed_driver_left(tmp_path: Path) -> None:
    from slime.cluster.local import Scratch

    gone = subprocess.Popen(["true"])
    gone.wait()
    killed = Scratch(tmp_path / "ray")
    (killed.path / "session" / "logs").mkdir(parents=True)
    (killed.path / "session" / "logs" / "raylet.out").write_text("why")
    (killed.path / "session_latest").symlink_to(killed.path / "session")
    killed._link = tmp_path / "ray" / f"{killed.path.name}-{gone.pid}"
    killed.link()
    after = Scratch(tmp_path / "ray")
    assert (killed._link / "raylet.out").read_text() == "why" and not killed._link.is_symlink()
    assert not killed.path.exists() and after.path.exists()
    after.collect()
    assert not after.path.exists()
