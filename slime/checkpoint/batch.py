"""batch.npz of an iteration: the finished batch that the next update trains on."""

import io
import zipfile
from pathlib import Path

from slime.checkpoint.manifest import InvalidCheckpoint
from slime.observe.hashed import write_hashed
from slime.types import Batch

NAME = "batch.npz"


def write_batch(directory: Path, batch: Batch) -> None:
    """Write the batch into the folder of an iteration. Raises OSError where the disk refuses or gives back other bytes."""
    content = io.BytesIO()
    batch.write(content)
    write_hashed(directory / NAME, content.getbuffer())


def read_batch(directory: Path) -> Batch | None:
    """The batch, None where the iteration has none (the last of a run). Raises InvalidCheckpoint for another form."""
    path = directory / NAME
    if not path.exists():
        return None
    try:
        return Batch.load(path)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidCheckpoint(f"its {NAME} cannot be read ({error!r})") from error
