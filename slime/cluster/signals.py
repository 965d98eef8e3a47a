"""Ctrl-C and SIGTERM as a request to save and stop, with a deadline."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from slime.config.exits import SavedRunAgain


class StopSignal:
    """While entered: the first SIGTERM or SIGINT sets `received` and starts the grace period, a second SIGINT interrupts at once.

    When `grace_s` is over and the run has not stopped by itself, the main thread is interrupted: by SavedRunAgain where the run has a
    commit to go on from (`committed`), else by RuntimeError.
    Outside the main thread (tests, notebooks) it installs nothing.
    """

    def __init__(self, grace_s: float) -> None:
        self.received: str | None = None
        self.committed: Path | None = None  # the last one
        self._grace_s = grace_s
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGALRM: self._grace_over}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _grace_over(self, number: int, frame: FrameType | None) -> None:
        late = f"stopped by {self.received}: the step did not finish within {self._grace_s:g} s (run.grace_s)"
        if self.committed is None:
            raise RuntimeError(f"{late} and nothing was committed before; set run.save_every, or give more time")
        raise SavedRunAgain(f"{late}; the run goes on from {self.committed}")
