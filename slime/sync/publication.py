"""What becomes of a publication: a state machine without I/O. The driver keeps one `Publication` for each version.

It says which `Action`s are due and is told how each ended:

    IDLE -> PREPARING -> PREPARED -> COMMITTING -> PROVEN -> DONE         every live engine runs the new version
                 |          |           |
                 +----------+           +-> ROLLING_BACK -> ABORTED       every live engine runs the version before
                 +-> DROPPING -> ABORTED

Three engines of which e1 fails its proof, on_mismatch=stop:

    begin()                             -> PREPARE e0 e1 e2
    done(PREPARE ...) for each          -> nothing; PREPARED
    commit()                            -> COMMIT e0 e1 e2
    done(COMMIT e0)                     -> nothing
    failed(COMMIT e1, "mlp.up differs") -> UNDO e0, UNDO e1; e2 is waited for
    done(COMMIT e2)                     -> UNDO e2
    done(UNDO ...) for each             -> RESUME e0 e1 e2
    done(RESUME ...) for each           -> nothing; ABORTED

No sequence of answers, losses and deaths makes two engines go on with different versions, an engine go on unproven, or the trainer's
snapshot run ahead of a live engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Do(StrEnum):
    PREPARE = "prepare"  # check, decode, stage, while it generates
    DROP = "drop"  # let go what was staged
    COMMIT = "commit"  # pause, write, prove
    UNDO = "undo"  # write the old bits back, prove
    HEAL = "heal"  # load the new version whole, prove
    RESUME = "resume"  # accept what is proven and go on
    FENCE = "fence"  # it gets no requests; needs no answer
    ACKNOWLEDGE = "acknowledge"  # the trainer's snapshot and the host copies become the version; needs no answer


@dataclass(frozen=True, slots=True)
class Action:
    do: Do
    engine: str = ""  # "" of ACKNOWLEDGE


class Phase(StrEnum):
    IDLE = "idle"
    PREPARING = "preparing"
    PREPARED = "prepared"
    DROPPING = "dropping"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling back"
    PROVEN = "proven"
    DONE = "done"
    ABORTED = "aborted"


ENDED = (Phase.DONE, Phase.ABORTED)


class Publication:
    """One version into all engines, all or none. Every method returns the actions that are due now; each is returned once.

    An engine is asked one thing at a time: an answer to anything else (late, or twice) is ignored. A lost answer, or one that is not there
    at the deadline, is told by `failed`.
    """

    def __init__(self, engines: Iterable[str], heal: bool = False) -> None:
        """`heal` is sync.on_mismatch=heal. `engines` are those that are live."""
        self.phase = Phase.IDLE
        self.reason = ""  # why it aborts
        self.fenced: dict[str, str] = {}  # engine -> why
        self.deserted = False  # whether it ended because no engine was left
        self.acknowledged = False  # whether the trainer's snapshot is the version
        self._heal = heal
        self._asked: dict[str, tuple[Do | None, bool]] = dict.fromkeys(engines, (None, False))  # the last thing, and whether it is done

    @property
    def live(self) -> list[str]:
        return list(self._asked)

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    def outstanding(self) -> list[Action]:
        """What was asked and is not answered."""
        return [Action(do, engine) for engine, (do, done) in self._asked.items() if do is not None and not done]

    def begin(self) -> list[Action]:
        assert self.phase is Phase.IDLE
        self.phase = Phase.PREPARING
        return [self._ask(engine, Do.PREPARE) for engine in self.live] + self._step()

    def commit(self) -> list[Action]:
        """Every engine is PREPARED, and now is the time."""
        assert self.phase is Phase.PREPARED, self.phase
        self.phase = Phase.COMMITTING
        return [self._ask(engine, Do.COMMIT) for engine in self.live]

    def abort(self, reason: str) -> list[Action]:
        """Give up, unless every engine is proven already."""
        if self.phase in (Phase.PREPARING, Phase.PREPARED):
            self._give_up(Phase.DROPPING, reason)
        elif self.phase is Phase.COMMITTING:
            self._give_up(Phase.ROLLING_BACK, reason)
        return self._step()

    def done(self, action: Action) -> list[Action]:
        """An action succeeded; of COMMIT, HEAL and UNDO: and is proven."""
        if self._asked.get(action.engine) != (action.do, False):
            return []
        self._asked[action.engine] = (action.do, True)
        return self._step()

    def failed(self, action: Action, reason: str) -> list[Action]:
        """An action failed, or nobody knows whether it succeeded."""
        if self._asked.get(action.engine) != (action.do, False):
            return []
        reason = f"{action.engine}: {action.do} failed: {reason}"
        if action.do is Do.PREPARE:
            self._asked[action.engine] = (action.do, True)
            self._give_up(Phase.DROPPING, reason)
        elif action.do is Do.COMMIT and self._heal and self.phase is Phase.COMMITTING:
            return [self._ask(action.engine, Do.HEAL)]
        elif action.do is Do.COMMIT:
            self._asked[action.engine] = (action.do, True)
            self._give_up(Phase.ROLLING_BACK, reason)
        else:
            return self._lose(action.engine, reason)
        return self._step()

    def died(self, engine: str, reason: str) -> list[Action]:
        """An engine's process or host is gone."""
        return self._lose(engine, f"{engine}: it died: {reason}") if engine in self._asked else []

    def _lose(self, engine: str, reason: str) -> list[Action]:
        """The engine is fenced and leaves the quorum."""
        del self._asked[engine]
        self.fenced[engine] = reason
        return [Action(Do.FENCE, engine), *self._step()]

    def _give_up(self, phase: Phase, reason: str) -> None:
        self.reason = self.reason or reason
        self.phase = phase

    def _ask(self, engine: str, do: Do) -> Action:
        self._asked[engine] = (do, False)
        return Action(do, engine)

    def _all(self, *what: Do) -> bool:
        """Whether every live engine has done the last it was asked, and that was one of these."""
        return all(done and do in what for do, done in self._asked.values())

    def _step(self) -> list[Action]:
        """What follows from what is known, until nothing does."""
        due: list[Action] = []
        while (more := self._next()) is not None:
            due += more
        return due

    def _next(self) -> list[Action] | None:
        """One transition; None where something must be waited for."""
        if not self.ended and self.phase is not Phase.PROVEN and not self._asked:
            self.deserted = not self.reason
            return self._end(Phase.ABORTED, self.reason or f"no engine is left: {'; '.join(self.fenced.values()) or 'none took part'}")
        match self.phase:
            case Phase.PREPARING if self._all(Do.PREPARE):
                self.phase = Phase.PREPARED
                return None
            case Phase.DROPPING:
                return self._replace(Do.PREPARE, Do.DROP) or (self._end(Phase.ABORTED, self.reason) if self._all(Do.DROP) else None)
            case Phase.COMMITTING if self._all(Do.COMMIT, Do.HEAL):
                self.phase, self.acknowledged = Phase.PROVEN, True
                return [*(self._ask(engine, Do.RESUME) for engine in self.live), Action(Do.ACKNOWLEDGE)]
            case Phase.PROVEN if self._all(Do.RESUME):
                self.deserted = not self._asked
                return self._end(Phase.DONE, "")
            case Phase.ROLLING_BACK:
                return self._roll_back()
        return None

    def _roll_back(self) -> list[Action] | None:
        """Undo what has written, or may have; nobody goes on before everybody is restored."""
        if actions := self._replace(Do.COMMIT, Do.UNDO) or self._replace(Do.HEAL, Do.UNDO):
            return actions
        if self._all(Do.UNDO):
            return [self._ask(engine, Do.RESUME) for engine in self.live]
        return self._end(Phase.ABORTED, self.reason) if self._all(Do.RESUME) else None

    def _replace(self, was: Do, do: Do) -> list[Action]:
        """Ask `do` of every engine that has answered `was`."""
        return [self._ask(engine, do) for engine, asked in list(self._asked.items()) if asked == (was, True)]

    def _end(self, phase: Phase, reason: str) -> list[Action]:
        self.phase, self.reason = phase, reason
        return []
