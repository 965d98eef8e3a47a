"""Signals and run.max_hours, each sent to a driver of its own: what the run is told, how the process ends, and how soon."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

pytestmark = pytest.mark.e2e
DRIVER = """
import sys, threading, time
from pathlib import Path
from slime.cli.endings import exiting
from slime.cluster import signals
from slime.config.exits import SavedRunAgain

signals.UNWINDING_S = 0.5 if "lingers" in sys.argv or "thread" in sys.argv else 1.0
if "thread" in sys.argv[5:]:
    threading.Thread(target=time.sleep, args=(20,)).start()
grace_s, max_hours, committed, does = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
with exiting(), signals.StopSignal(grace_s, max_hours) as stop:
    stop.committed = Path("iter_0000003") if committed else None
    print("running", flush=True)
    told, give_up = False, time.monotonic() + 20
    try:
        while time.monotonic() < give_up:
            time.sleep(0.01)
            if stop.received and not told:
                told = True
                print(stop.received, flush=True)
            if stop.received and does != "hangs":
                break
    finally:
        if does == "lingers":
            stop.leave()
        if does in ("lingers", "hangs"):
            try:
                time.sleep(20 if does == "lingers" else 0)
            finally:
                time.sleep(20 if "stuck" in sys.argv[5:] else 0)
    raise SavedRunAgain(f"stopped by {stop.received} after update 3; saved")
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a driver that saves as soon as it is asked to; or `lingers` then, or `hangs`, `stuck` even when it is interrupted."""
    drivers = []

    def run(does: str = "saves", *more: str, grace_s: float = 20.0, max_hours: float = 0.0, committed: bool = True) -> subprocess.Popen:
        arguments = [str(grace_s), str(max_hours), "x" if committed else "", does, *more]
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        drivers.append(driver)
        assert driver.stdout is not None and driver.stdout.readline() == "running\n"
        return driver

    yield run
    for driver in drivers:
        driver.kill()
        driver.wait()


def told(driver: subprocess.Popen) -> str:
    assert driver.stdout is not None
    return driver.stdout.readline().strip()


def ended(driver: subprocess.Popen, within_s: float = 5.0) -> tuple[int, str]:
    _, err = driver.communicate(timeout=within_s)
    return driver.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_save(start: Start, number: signal.Signals):
    driver = start()
    driver.send_signal(number)
    assert told(driver) == number.name
    assert ended(driver) == (75, f"slime: stopped by {number.name} after update 3; saved\n")


@pytest.mark.parametrize(
    ("second", "committed", "code", "says"),
    [
        (signal.SIGINT, True, 75, "ended at once by SIGINT, after SIGUSR1: the run goes on from iter_0000003"),
        (signal.SIGTERM, False, 143, "ended at once by SIGTERM, after SIGUSR1: nothing was committed before"),
        (signal.SIGINT, False, 130, "ended at once by SIGINT"),
    ],
)
def test_a_second_signal_ends_at_once(start: Start, second: signal.Signals, committed: bool, code: int, says: str):
    driver = start("hangs", committed=committed)
    driver.send_signal(signal.SIGUSR1)
    assert told(driver) == "SIGUSR1"
    driver.send_signal(second)
    found, err = ended(driver)
    assert found == code and says in err


def test_a_signal_that_a_launcher_sends_twice_is_one(start: Start):
    driver = start("hangs", grace_s=0.6)
    driver.send_signal(signal.SIGTERM)
    assert told(driver) == "SIGTERM"
    driver.send_signal(signal.SIGTERM)
    found, err = ended(driver)
    assert found == 75 and "the step did not finish within 0.6 s (run.grace_s)" in err


def test_whoever_is_stuck_is_ended_and_a_third_signal_does_not_wait(start: Start):
    for signals in (2, 3):
        driver = start("hangs", "stuck", committed=signals == 2)
        driver.send_signal(signal.SIGTERM)
        assert told(driver) == "SIGTERM"
        begun = time.monotonic()
        for _ in range(signals - 1):
            driver.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert ended(driver)[0] == (75 if signals == 2 else 138)
        assert (time.monotonic() - begun < 0.95) is (signals == 3)


@pytest.mark.parametrize("committed", [True, False])
def test_the_end_of_the_grace_period(start: Start, committed: bool):
    driver = start("hangs", grace_s=0.3, committed=committed)
    driver.send_signal(signal.SIGTERM)
    found, err = ended(driver)
    assert found == (75 if committed else 1)
    assert ("goes on from iter_0000003" if committed else "nothing was committed before; set run.save_every") in err


def test_whoever_does_not_come_to_its_end_is_ended(start: Start):
    """A thread that hangs would keep the process although the run has unwound."""
    driver = start("hangs", "thread", grace_s=0.3)
    driver.send_signal(signal.SIGTERM)
    found, err = ended(driver)
    assert found == 75 and "goes on from iter_0000003" in err


def test_the_end_of_the_grace_period_does_not_interrupt_a_run_that_ends_by_itself(start: Start):
    driver = start("lingers", grace_s=0.3)
    begun = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    assert ended(driver) == (75, "") and time.monotonic() - begun > 0.75  # ended after 0.3 s and UNWINDING_S


def test_the_limit_in_hours_begins_the_stop_a_grace_period_before(start: Start):
    """Hours of the process, which had started before it entered."""
    begun = time.monotonic()
    driver = start(grace_s=2.2, max_hours=3.0 / 3600)
    assert told(driver) == "run.max_hours=0.000833333"
    assert 0.7 < time.monotonic() - begun < 2.7
    assert ended(driver)[0] == 75


def test_a_limit_that_has_passed_stops_at_once(start: Start):
    driver = start("hangs", grace_s=0.2, max_hours=1e-6)
    assert told(driver) == "run.max_hours=1e-06" and ended(driver)[0] == 75


def test_a_process_knows_its_age():
    code = "import time; time.sleep(0.2); from slime.cluster.signals import process_age_s; print(process_age_s())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.2 <= float(out) < 10
