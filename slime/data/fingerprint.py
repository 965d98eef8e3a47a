"""Whether a data file is the one that a run began with, told by its content: files move, and a name says nothing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

BLOCK = 64 << 10  # bytes
BLOCKS = 256  # that are read of a large file: 16 MiB


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Size and hash of a file. Up to 16 MiB the hash is of every byte; of a larger file it is of evenly spaced blocks, first and last
    included, so that a byte changed elsewhere, in a file of the same size, may go unseen."""

    bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a file. Raises OSError where it cannot be read."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in starts(size):
            file.seek(start)
            digest.update(file.read(BLOCK))
    return Fingerprint(size, digest.hexdigest())


def starts(size: int) -> list[int]:
    """Where the blocks begin that are read of a file of `size` bytes."""
    if size <= BLOCK * BLOCKS:
        return list(range(0, size, BLOCK))
    return [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
