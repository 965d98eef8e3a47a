"""From an exception to an exit code and one line on stderr."""

import errno
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slime.config.exits import CONFIG, FAILED, ConfigError, GateStopped, NothingToDo, PreflightError, SavedRunAgain, StoppedAtOnce

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
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
        raise _exit(disk_full(error) or error, FAILED) from error
    except StoppedAtOnce as ending:
        raise _exit(ending, ending.exit_code) from ending
    except KeyboardInterrupt as error:
        sys.stderr.write("slime: interrupted\n")
        raise SystemExit(INTERRUPTED) from error


def disk_full(error: BaseException) -> OSError | None:
    """Of an error that a full disk or a quota lies behind: what could not be written, where there is room, and the mend. None of others."""
    behind: BaseException | None = error
    while behind is not None and not (isinstance(behind, OSError) and behind.errno in FULL):
        behind = behind.__cause__
    if behind is None:
        return None
    if behind.filename is not None:
        path = Path(os.fsdecode(behind.filename)).absolute()
        where, rooms = f"{path}: ", [next((folder for folder in path.parents if folder.is_dir()), Path("/"))]
    else:  # a write that failed does not know its file
        where, rooms = "", [Path.cwd(), Path(tempfile.gettempdir()), Path("/dev/shm")]
    free = ", ".join(f"{shutil.disk_usage(room).free / 1e9:.2f} GB in {room}" for room in dict.fromkeys(rooms) if room.is_dir())
    quota = " (a quota may allow less)" if behind.errno == errno.EDQUOT else ""
    mend = "make room there (run.keep_last=1 keeps one checkpoint), and the same command goes on from the run's last whole checkpoint"
    full = OSError(f"{where}{behind.strerror}; free: {free}{quota}; {mend}")
    full.__cause__ = error
    return full


def _exit(ending: BaseException, code: int) -> SystemExit:
    log.info("exit code %d", code, exc_info=ending)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(ending)
    sys.stderr.write(f"slime: {ending}\n")
    return SystemExit(code)
