"""What a Ray on this host leaves on it: a scratch directory, logs, processes; and who tidies them up."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slime.cluster import reaper

log = logging.getLogger(__name__)

SESSION = "session_latest"  # Ray's link to the running session, in its temporary directory
REAP_S = 60.0  # above the reaper's own patience
KEEP_ENVIRONMENT = "SPT_NOENV"  # Ray's agents write their titles over their environment, and the mark with it, unless this is set


class Scratch:
    """Ray's temporary directory, short and away from the run, with the process that tidies up after it.

    While Ray runs, `logs/ray/<name>` in the run links to its logs. At the end, or when this process is killed, the reaper ends every
    process that was started under `marked`, puts the logs themselves in the link's place and removes the directory.
    """

    def __init__(self, log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="slime-ray-", dir="/tmp"))
        self._link = log_dir / self.path.name
        command = [sys.executable, reaper.__file__, str(self.path), str(self._link.absolute())]
        self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """Processes started inside, and all that they start, belong to this Ray."""
        os.environ.setdefault(KEEP_ENVIRONMENT, "1")
        os.environ[reaper.MARK] = self.path.name
        try:
            yield
        finally:
            del os.environ[reaper.MARK]

    def link(self) -> None:
        """Show the running session's logs in the run."""
        self._link.symlink_to((self.path / SESSION).resolve() / "logs")

    def collect(self) -> None:
        """End what is left, move the logs into the run, remove the directory. Where that takes too long it goes on by itself: a run's end
        must not depend on it."""
        try:
            self._reaper.communicate(timeout=REAP_S)
        except subprocess.TimeoutExpired:
            log.error("the processes and logs of Ray in %s are not tidied up after %g s: a process does not end", self.path, REAP_S)
