"""A directory as a store of weights, local or of a network: after a loss of power, what was written is there whole or not at all."""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slime.observe.files import fsync_directory
from slime.sync.places import Busy, Missing, Store, checked

LOCK = ".lock"
LOCK_S = 5.0  # for the lock of another writer, who holds it for one small file; a host that hangs may hold it for long
TEMPORARY = ".tmp-"  # no name in a store begins with a dot


class Files:
    """The calls to the file system, each one step of which a crash leaves all or nothing to be seen. Tests put another under the store."""

    def make_directory(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """A new file, not durable yet."""
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """The bytes of a file become durable."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, path: Path, to: Path) -> None:
        os.replace(path, to)

    def sync_directory(self, path: Path) -> None:
        """The names in a directory become durable."""
        fsync_directory(path)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def is_directory(self, path: Path) -> bool:
        return path.is_dir()

    def is_file(self, path: Path) -> bool:
        return path.is_file()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def walk(self, path: Path) -> Iterator[Path]:
        """All files below a directory."""
        for folder, _, names in os.walk(path):
            yield from (Path(folder) / name for name in names)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """One holder at a time, of all processes of all hosts that see the file. Raises Busy where another keeps it."""
        ends = time.monotonic() + LOCK_S
        with path.open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= ends:
                        raise Busy(f"{path}: another writer has held this lock for {LOCK_S:g} s") from None
                    time.sleep(0.02)
            yield


class LocalStore(Store):
    """Files below a directory, which is made."""

    def __init__(self, root: Path, files: Files | None = None) -> None:
        self.where = str(root)
        self._root, self._files = root, files or Files()

    def put(self, name: str, data: bytes) -> None:
        """Raises OSError, such as of a full disk, and leaves nothing behind then."""
        path = self._path(name)
        self._make_directory(path.parent)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            self._files.write(temporary, data)
            self._files.sync(temporary)
            self._files.rename(temporary, path)
        except OSError:
            self._files.unlink(temporary)
            raise
        self._files.sync_directory(path.parent)

    def get(self, name: str, limit: int) -> bytes:
        path = self._path(name)
        try:
            size = self._files.size(path)
            if size > limit:
                raise ValueError(f"{path}: has {size} bytes, at most {limit} are expected")
            return self._files.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"{path}: not there") from None

    def exists(self, name: str) -> bool:
        return self._files.is_file(self._path(name))

    def list(self, prefix: str) -> "list[str]":
        below = self._path(prefix) if prefix else self._root
        found = (path.relative_to(self._root) for path in self._files.walk(below))
        return sorted(path.as_posix() for path in found if not path.name.startswith("."))

    def delete(self, name: str) -> None:
        path = self._path(name)
        if self._files.is_file(path):
            self._files.unlink(path)
            self._files.sync_directory(path.parent)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Writers take turns by a lock on a file of the directory; a network file system must be one whose locks reach all hosts, such as
        NFS 4 or Lustre with flock."""
        self._make_directory(self._root)
        with self._files.lock(self._root / LOCK):
            path = self._path(name)
            found = self._files.read(path) if self._files.is_file(path) else None
            if found != expected:
                return False
            self.put(name, data)
            return True

    def _path(self, name: str) -> Path:
        return self._root / checked(name)

    def _make_directory(self, path: Path) -> None:
        """With its parents, each durable in the one above."""
        if self._files.is_directory(path):
            return
        self._make_directory(path.parent)
        self._files.make_directory(path)
        self._files.sync_directory(path.parent)
