"""From an exception to an exit code and one line on stderr."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from slime.config.exits import CONFIG, FAILED, ConfigError, GateStopped, NothingToDo, PreflightError, SavedRunAgain

log = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def exiting() -> Iterator[None]:
    """Exit with the code of what is raised.

    An error of the user's (ValueError) or of the world (timeouts, dead processes) is told by its text alone; the traceback is in the run's
    log, and HYDRA_FULL_ERROR=1 shows it. Anything else is a defect and shows it always.
    """
    try:
        yield
    except (ConfigError, PreflightError, NothingToDo, GateStopped, SavedRunAgain) as ending:
        raise _exit(ending, ending.exit_code) from ending
    except ValueError as error:
        raise _exit(error, CONFIG) from error
    except (RuntimeError, OSError) as error:
        raise _exit(error, FAILED) from error
    except KeyboardInterrupt as error:
        sys.stderr.write("slime: interrupted\n")
        raise SystemExit(INTERRUPTED) from error


def _exit(ending: BaseException, code: int) -> SystemExit:
    log.info("exit code %d", code, exc_info=ending)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(ending)
    sys.stderr.write(f"slime: {ending}\n")
    return SystemExit(code)
