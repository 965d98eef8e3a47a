"""What a Ray on this host leaves on it: its scratch directory and its logs."""

import os
import shutil
import tempfile
from pathlib import Path

SESSION = "session_latest"  # Ray's link to the running session, in its temporary directory


class Scratch:
    """Ray's temporary directory, short and away from the run; its logs end up in the run.

    While Ray runs, `logs/ray/<name>` links to its logs. `collect` puts the logs themselves there and removes the rest. A driver that was
    killed leaves the link; the next start in the same run collects it.
    """

    def __init__(self, log_dir: Path) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        for link in log_dir.iterdir():
            if link.is_symlink() and not _alive(int(link.name.rpartition("-")[2])):
                _collect(link)
        self.path = Path(tempfile.mkdtemp(prefix="slime-ray-", dir="/tmp"))
        self._link = log_dir / f"{self.path.name}-{os.getpid()}"

    def link(self) -> None:
        """Show the running session's logs in the run."""
        self._link.symlink_to((self.path / SESSION).resolve() / "logs")

    def collect(self) -> None:
        """Move the logs into the run and remove the directory."""
        if self._link.is_symlink():
            _collect(self._link)
        shutil.rmtree(self.path, ignore_errors=True)


def _collect(link: Path) -> None:
    """Replace a link to a session's logs by the logs; remove the session's temporary directory."""
    logs = link.readlink()
    link.unlink()
    if logs.is_dir():
        shutil.copytree(logs, link, symlinks=True)
        shutil.rmtree(logs.parent.parent, ignore_errors=True)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
