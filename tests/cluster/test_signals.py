"""However the driver ends, nothing of the Ray that it started stays behind: processes are counted by a mark in their environment."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from slime.cluster.local import Scratch

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
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, a shell has it ignored
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


ENDINGS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}  # and the driver's exit code


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, tuple[subprocess.Popen, str, Path]]:
    """A driver for each ending, its mark and its directory; they start side by side."""
    started = {}
    for number in ENDINGS:
        mark, directory = f"SLIME_TEST_MARK={uuid.uuid4().hex}", tmp_path_factory.mktemp("run")
        name, _, value = mark.partition("=")
        command = [sys.executable, "-c", DRIVER, str(directory)]
        driver = subprocess.Popen(command, env=os.environ | {name: value}, stdout=subprocess.PIPE, text=True, process_group=0)
        started[number] = (driver, mark, directory)
    return started


@pytest.mark.parametrize("number", ENDINGS)
def test_nothing_stays_behind(number: signal.Signals, drivers: dict[signal.Signals, tuple[subprocess.Popen, str, Path]]) -> None:
    driver, mark, directory = drivers[number]
    assert driver.stdout is not None and driver.stdout.readline() == "running\n"
    assert len(marked(mark)) > 5
    assert os.getpgid(driver.pid) == driver.pid
    driver.send_signal(number)
    assert driver.wait(30) == ENDINGS[number]
    give_up = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert not left
    (logs,) = (directory / "logs" / "ray").iterdir()
    assert (logs / "raylet.out").is_file() and not logs.is_symlink()
    assert not (Path("/tmp") / logs.name).exists()


def test_reaper_ends_what_does_not_end_by_itself(tmp_path: Path) -> None:
    """A process of its own session, outside Ray's reach, that ignores every polite signal."""
    scratch = Scratch(tmp_path / "ray")
    (scratch.path / "session" / "logs").mkdir(parents=True)
    (scratch.path / "session" / "logs" / "raylet.out").write_text("why")
    (scratch.path / "session_latest").symlink_to(scratch.path / "session")
    with scratch.marked():
        stubborn = subprocess.Popen(["bash", "-c", "trap '' TERM INT HUP; while true; do sleep 1; done"], start_new_session=True)
    bystander = subprocess.Popen(["sleep", "60"])
    scratch.link()
    scratch.collect()
    assert stubborn.wait(5) == -signal.SIGKILL
    assert bystander.poll() is None
    bystander.kill()
    assert (tmp_path / "ray" / scratch.path.name / "raylet.out").read_text() == "why"
    assert not scratch.path.exists()


STOPPED = """
import sys, time
from pathlib import Path
from slime.cli.endings import exiting
from slime.cluster.session import connect
from slime.cluster.signals import StopSignal
from slime.config import SlimeConfig
from slime.config.exits import SavedRunAgain

with exiting(), StopSignal(60.0) as stop, connect(SlimeConfig(), Path(sys.argv[1])):
    print("running", flush=True)
    for _ in range(300):
        time.sleep(0.1)
        if stop.received:
            raise SavedRunAgain(f"stopped by {stop.received}; saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_although_ray_has_started(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert driver.stdout is not None and driver.stdout.readline() == "running\n"
    driver.send_signal(number)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 75 and f"slime: stopped by {number.name}; saved" in err
