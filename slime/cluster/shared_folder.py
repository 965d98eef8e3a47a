"""A folder in this host's shared memory that goes with its process: what a killed one left is removed by the next.

Each folder holds a file that its process keeps locked. Nothing but the end of the process releases the lock, however it ends.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX, LOCK, TRIES = "slime-", "in-use", 3


def shared_root() -> Path:
    """Where the folders are."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


class SharedFolder:
    """`path` is a new folder that only this user can open. `close` removes it."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: which one, in `shared_root()` and named with PREFIX; by default a name that nobody has. Raises FileExistsError where
        another process holds it, or another user made it."""
        root = shared_root() if path is None else path.parent
        _sweep(root)
        for _ in range(TRIES):  # a sweeper may come between the file and its lock
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root)) if path is None else _made(path)
            self._lock = _locked(self.path / LOCK, os.O_RDWR | os.O_CREAT)
            if self._lock >= 0:
                break

    def close(self) -> None:
        """May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def _made(path: Path) -> Path:
    """A folder of this name. What a process left that was killed before it had the lock goes first."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
        return path
    ours = not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.getuid()
    if ours and (lock := _locked(path / LOCK, os.O_RDWR | os.O_CREAT)) >= 0:
        shutil.rmtree(path)
        os.close(lock)
    path.mkdir(0o700)
    return path


def _sweep(root: Path) -> None:
    """Remove the folders of processes that have ended. Folders without a lock file are not ours to judge."""
    for path in root.glob(f"{PREFIX}*/{LOCK}"):
        if (lock := _locked(path, os.O_RDWR)) >= 0:
            shutil.rmtree(path.parent, ignore_errors=True)
            os.close(lock)


def _locked(path: Path, flags: int) -> int:
    """A descriptor that holds the file's lock; -1 where another has it, or the file is not there or not ours."""
    with contextlib.suppress(OSError):
        file = os.open(path, flags, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                return file
        os.close(file)
    return -1
