"""How a run ends: exit codes, and the exception of each.

A scheduler acts on these, so they are a contract: 75 (EX_TEMPFAIL) asks to be run again, 4 tells a finished run from a failed one.
An exception's text is all that a user sees: it names the value, the place and the knob to turn.
"""

DONE = 0
FAILED = 1
CONFIG = 2
PREFLIGHT = 3
NOTHING_TO_DO = 4
GATE = 5
SAVED_RUN_AGAIN = 75

MEANING = {
    DONE: "done",
    FAILED: "failed: the last line of stderr says why, the run's logs/driver.log has the traceback",
    CONFIG: "the recipe is wrong; nothing was trained",
    PREFLIGHT: "the machine or cluster lacks something that the recipe asks for",
    NOTHING_TO_DO: "nothing to do: the run has all its steps already",
    GATE: "stopped by a gate: a threshold of the recipe was passed, or a loss or gradient is no number",
    SAVED_RUN_AGAIN: "stopped early and saved; run the same command again",
}


class ConfigError(ValueError):
    """The recipe is wrong."""

    exit_code = CONFIG


class PreflightError(RuntimeError):
    """The machine or cluster lacks something that the recipe asks for."""

    exit_code = PREFLIGHT


class NothingToDo(Exception):
    """The run has completed all its steps already."""

    exit_code = NOTHING_TO_DO


class GateStopped(RuntimeError):
    """A threshold of the recipe was passed, such as observe.mismatch_stop or reward.max_error_frac."""

    exit_code = GATE


class NotFinite(GateStopped):
    """A loss or a gradient is not finite; the optimizer step was not taken."""


class SavedRunAgain(Exception):
    """Stopped early by a signal or a limit; the state is saved."""

    exit_code = SAVED_RUN_AGAIN


class GraceOver(RuntimeError):
    """A stop took longer than run.grace_s and nothing had been saved before."""


class StoppedAtOnce(KeyboardInterrupt):
    """Ended by a second signal: what was under way is given up."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code  # SAVED_RUN_AGAIN where there is a checkpoint to go on from, else 128 + the signal's number
