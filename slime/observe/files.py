"""Writing a file so that a reader sees the whole old one or the whole new one, after a crash too."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def fsync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8): temporary name beside it, fsync, rename, fsync of the directory.

    Two processes must not write one path. Raises OSError where the disk refuses; the old file is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to, without what a crash has cut off at its end, which is told."""
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        log.warning("%s: the last line was cut off by a crash and is ignored", path)
    return whole.split(b"\n") if whole else []
