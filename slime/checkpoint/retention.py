"""Which iterations stay: the newest `run.keep_last` that are complete."""

import logging
import os
import shutil
from pathlib import Path

from slime.checkpoint import manifest
from slime.checkpoint.save import iterations

log = logging.getLogger(__name__)


def keep_newest(run_dir: Path, keep: int) -> list[Path]:
    """Delete all iterations older than the newest `keep` complete ones; call it after a commit. Returns what was deleted.

    Complete: the manifest is sound and every file has its size (contents are hashed at a restore). Nothing goes as long
    as fewer than `keep` are complete, and nothing newer than the oldest that stays. A folder is renamed before it is
    emptied, so that a crash never leaves half of an iteration under its name.
    """
    assert keep >= 1, "at least one iteration stays"
    present = iterations(run_dir)
    complete = [step for step, path in present.items() if _complete(path, step)]
    if len(complete) < keep:
        return []
    old = [path for step, path in present.items() if step < complete[-keep]]
    for path in old:
        doomed = path.with_name(path.name + ".tmp")  # an unfinished save, for clean_up
        os.rename(path, doomed)
        shutil.rmtree(doomed)
        log.info("deleted the checkpoint %s", path)
    return old


def _complete(path: Path, step: int) -> bool:
    try:
        manifest.verify(path, step=step, content=False)
    except manifest.InvalidCheckpoint as error:
        log.warning("%s is not a checkpoint: %s", path, error)
        return False
    return True
