"""Signals and a job's time limit as a request to save and stop, with a deadline.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a scheduler's warning) ask the run to stop, as does run.max_hours; the run looks at `received` where
it may save. One real-time interval timer (SIGALRM) serves both clocks: until the request it runs to run.max_hours, from then on it
is the grace period. Hours count from the start of the process, whatever it did before: that is what a scheduler counts.

What is on disk is whole at every moment, so any ending is safe. The only question is how much of the work is kept.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from slime.config.exits import FAILED, SAVED_RUN_AGAIN, GraceOver, SavedRunAgain, StoppedAtOnce

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_S = 0.2  # a launcher signals the process and its group: the same signal twice, at once
UNWINDING_S = 10.0  # what ends at once may take so long to end what it started; then the kernel ends it
LONGEST_S = 3e7  # that a timer is set to: a year


class StopSignal:
    """While entered, the first signal, or run.max_hours less the grace period, sets `received` and starts the grace period of `grace_s`.

    A second signal ends the run at once, as does the end of the grace period where the run has not stopped by itself: the main thread is
    interrupted, and UNWINDING_S later the process ends, wherever it is; a third signal does not wait for that. The exit code is 75 where
    the run has a commit to go on from (`committed`); without one it is 128 + the signal's number, or 1 after the grace period. Outside the
    main thread (tests, notebooks) it installs nothing.
    """

    def __init__(self, grace_s: float, max_hours: float = 0.0) -> None:
        self.received: str | None = None
        self.committed: Path | None = None  # the last one
        self._grace_s, self._max_hours = grace_s, max_hours
        self._last: tuple[int, float] = (0, 0.0)  # signal, and when: time.monotonic()
        self._leaving = False  # the run ends by itself
        self._given_up = False  # there are ten seconds left
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {**dict.fromkeys(STOPPING, self._stop), signal.SIGALRM: self._time_is_over}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
            if self._max_hours:
                _alarm(self._max_hours * 3600 - self._grace_s - process_age_s())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def leave(self) -> None:
        """The run has done what a stop asked for and ends by itself: the end of the grace period bounds that, and interrupts nothing."""
        self._leaving = self.received is not None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        (last, last_s), self._last = self._last, (number, now)
        name = signal.Signals(number).name
        if self.received is None:
            self._request(name)
        elif self._given_up:
            os._exit(self._code(128 + number))
        elif number != last or now - last_s > SAME_REQUEST_S:
            code = self._code(128 + number)
            self._give_up(code)
            raise StoppedAtOnce(f"ended at once by {name}, after {self.received}: {self._kept()}", code)

    def _time_is_over(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._request(f"run.max_hours={self._max_hours:g}")
        elif not self._given_up:
            self._give_up(self._code(FAILED))
            if self._leaving:
                return
            late = f"stopped by {self.received}: the step did not finish within {self._grace_s:g} s (run.grace_s)"
            if self.committed is None:
                raise GraceOver(f"{late} and nothing was committed before; set run.save_every, or give more time")
            raise SavedRunAgain(f"{late}; {self._kept()}")

    def _request(self, received: str) -> None:
        self.received = received
        _alarm(self._grace_s)

    def _give_up(self, code: int) -> None:
        """The main thread may hang where no interrupt reaches it, and so may whatever it ends on its way out, to the end of the process."""
        self._given_up = True
        signal.setitimer(signal.ITIMER_REAL, 0)

        def end() -> None:
            time.sleep(UNWINDING_S)
            os._exit(code)

        threading.Thread(target=end, name="end of the grace period", daemon=True).start()

    def _code(self, otherwise: int) -> int:
        return otherwise if self.committed is None else SAVED_RUN_AGAIN

    def _kept(self) -> str:
        return "nothing was committed before" if self.committed is None else f"the run goes on from {self.committed}"


def process_age_s() -> float:
    """Seconds since this process started, by the kernel's clock."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _alarm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, min(LONGEST_S, max(0.001, seconds)))
