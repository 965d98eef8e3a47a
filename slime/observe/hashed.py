"""Files that are hashed as they are written, out of memory: what a disk gives back later can be compared with what was meant.

The hash is XXH3 of 128 bits. It is meant for disks that err, not for people who forge, and costs a twentieth of SHA-256 on processors
without instructions for that.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash


@dataclass(frozen=True, slots=True)
class File:
    """What a file holds."""

    bytes: int
    xxh3_128: str  # hexadecimal


class HashedFile:
    """A new file. On disk, fsynced, when its block ends without an exception; its name is durable once its folder is fsynced.

        with HashedFile(path) as file:
            file.write(b"...")
        file.result     # File(bytes=3, xxh3_128="...") of what was written, not of what the disk took

    Raises OSError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = xxhash.xxh3_128()
        self.size = 0  # bytes so far

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        self._hash.update(view)
        self._file.write(view)
        self.size += view.nbytes

    @property
    def result(self) -> File:
        """Size and hash of what was written so far."""
        return File(self.size, self._hash.hexdigest())

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def write_hashed(path: Path, content: bytes | memoryview) -> File:
    """A whole new file, fsynced and read back. Raises OSError where the disk refuses or gives back other bytes."""
    with HashedFile(path) as file:
        file.write(content)
    if read_hashed(path) != file.result:
        raise OSError(f"{path} is not what was written to it: do not trust this disk")
    return file.result


def read_hashed(path: Path) -> File:
    """What a file holds, read once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return File(file.tell(), digest)
