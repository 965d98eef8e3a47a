"""batch.npz of an iteration: the finished batch that the next update trains on. A column of `Batch` is an array of the file."""

import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from slime.checkpoint.manifest import InvalidCheckpoint
from slime.types import Batch

NAME = "batch.npz"


def write_batch(directory: Path, batch: Batch) -> None:
    """Write every column, bit for bit."""
    with (directory / NAME).open("wb") as file:
        np.savez(file, **{f.name: getattr(batch, f.name) for f in fields(Batch)})


def read_batch(directory: Path) -> Batch | None:
    """The batch, None where the iteration has none (the last of a run). Raises InvalidCheckpoint for another form."""
    path = directory / NAME
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as columns:
            return Batch(**{name: columns[name] for name in columns.files})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidCheckpoint(f"its {NAME} cannot be read ({error!r})") from error
