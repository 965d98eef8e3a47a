"""A run that lost a process, a host or all of its engines starts again by itself, from its last checkpoint.

    for attempt in Attempts(cfg, signal):
        with attempt, open_run(attempt.cfg, resolved, signal) as run:
            attempt.began(run.begins_from)
            ...                                   # to the end; a loss ends the attempt, and the next one follows after a pause

What another attempt cannot mend is raised: a wrong recipe, a gate, a full disk, whatever the user's functions raise. So are deadlines that
pass before the first attempt has begun, and one more loss than run.max_restarts without a new checkpoint in between.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from slime.checkpoint.save import iterations
from slime.cluster.deadline import ProcessLost
from slime.cluster.signals import StopSignal
from slime.config import SlimeConfig
from slime.config.exits import PreflightError, SavedRunAgain
from slime.engine.errors import EngineLost

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
POLL_S = 0.2
LOSSES = (ProcessLost, EngineLost, TimeoutError)  # a deadline that passed: somebody hangs, or is gone without a word


@dataclass
class Budget:
    """How often a run may start again. Pure.

    budget = Budget(allowed=2)
    budget.lost(newest=10) -> 2.0     budget.lost(newest=10) -> 4.0     budget.lost(newest=10) -> None
    budget.lost(newest=20) -> 2.0     # after a new checkpoint it counts anew
    """

    allowed: int
    used: int = 0
    newest: int = -1  # checkpoint at the last loss

    def lost(self, newest: int) -> float | None:
        """Seconds to wait before the next attempt, None where there is none. `newest` is the run's newest checkpoint, -1 without any."""
        if newest > self.newest:
            self.used, self.newest = 0, newest
        if self.used >= self.allowed:
            return None
        self.used += 1
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self.used - 1))


class Attempts:
    """Iterate over it; see the module."""

    def __init__(self, cfg: SlimeConfig, signal: StopSignal) -> None:
        self._cfg, self._signal = cfg, signal
        self._directory = Path(cfg.run.dir).resolve() / str(cfg.run.name)
        self._budget = Budget(cfg.run.max_restarts)
        self._begins_from: str | None = None  # the checkpoint of another run, for as long as there is none of its own
        self._over = False

    def __iter__(self) -> "Iterator[Attempt]":
        yield Attempt(self, self._cfg, first=True)
        while not self._over:
            yield Attempt(self, replace(self._cfg, run=replace(self._cfg.run, resume=self._begins_from or self._resume())), first=False)

    def _resume(self) -> str:
        """run.resume of another attempt: there may be checkpoints of the run's own by then, newer than the one that it names."""
        named = self._cfg.run.resume
        own = self._directory in (Path(named).resolve(), Path(named).resolve().parent)
        return "auto" if named == "never" or own else named

    def begins_from(self, path: Path | None) -> None:
        self._begins_from = None if path is None else str(path)

    def ended(self) -> None:
        """The last attempt came to its end."""
        self._over = True

    def goes_on_after(self, loss: BaseException) -> bool:
        """Wait before the next attempt; False where there is none. Raises SavedRunAgain for a stop signal meanwhile."""
        newest = max(iterations(self._directory), default=-1)
        if self._signal.received and newest >= 0:  # whoever stops a job may end its ranks first
            raise SavedRunAgain(f"stopped by {self._signal.received}, and lost something meanwhile; the run goes on from step {newest}")
        pause_s = self._budget.lost(newest)
        if pause_s is None:
            log.error("given up after %d restarts without a new checkpoint (run.max_restarts)", self._budget.used)
            return False
        begins = "anew" if newest < 0 else f"from step {newest}"
        log.warning(
            "%s. Starts again %s in %g s (restart %d of %d, run.max_restarts)",
            *(str(loss).partition("\n")[0], begins, pause_s, self._budget.used, self._budget.allowed),
        )
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            if self._signal.received:
                if newest < 0:
                    return False
                raise SavedRunAgain(f"stopped by {self._signal.received} while it was about to start again; it goes on from step {newest}")
            time.sleep(POLL_S)
        return True


class Attempt:
    """One start of the run."""

    def __init__(self, attempts: Attempts, cfg: SlimeConfig, first: bool) -> None:
        self.cfg = cfg
        self._attempts = attempts
        self._losses: tuple[type[Exception], ...] = (ProcessLost,) if first else (*LOSSES, PreflightError)

    def began(self, begins_from: Path | None) -> None:
        """Everything is started: from here on a loss is not the recipe's fault. `begins_from` is the checkpoint of another run from which
        this one begins: another attempt takes the same, whatever that run has saved since."""
        self._losses = LOSSES
        self._attempts.begins_from(begins_from)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, self._losses):
            return self._attempts.goes_on_after(error)
        self._attempts.ended()
        return False
