"""Which iterations stay: the newest `run.keep_last` that are complete, and every `run.keep_every`th."""

import logging
import os
import shutil
from pathlib import Path

from slime.checkpoint import manifest
from slime.checkpoint.save import iterations

log = logging.getLogger(__name__)


def keep_newest(run_dir: Path, keep: int, every: int = 0, committed: int | None = None) -> list[Path]:
    """Delete what is older than the newest `keep` complete iterations; call it after the commit of step `committed`. Returns what was
    deleted.

    Complete: the manifest is sound and every file has its size (contents are hashed at a commit and at a restore). Iterations beyond
    `committed` are of a continuation that a resume has passed over: they count for nothing and stay. So does a step that is a multiple of
    `every`, unless that is 0. Nothing goes as long as `committed` itself is not complete, or fewer than `keep` are. A folder is renamed
    before it is emptied, so that a crash never leaves half of an iteration under its name.
    """
    assert keep >= 1, "at least one iteration stays"
    present = {step: path for step, path in iterations(run_dir).items() if committed is None or step <= committed}
    complete = [step for step, path in present.items() if _complete(path, step)]
    if len(complete) < keep or committed not in (None, complete[-1]):
        return []
    old = [path for step, path in present.items() if step < complete[-keep] and not (every and step % every == 0)]
    for path in old:
        doomed = path.with_name(path.name + ".tmp")  # an unfinished save, for clean_up
        if doomed.exists():
            shutil.rmtree(doomed)
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
