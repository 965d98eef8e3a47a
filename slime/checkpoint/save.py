"""Writing an iteration so that it exists whole or not at all; `saver` calls these.

    directory = begin(run_dir, 10)                              # iter_0000010.tmp, shared with the ranks
    saving = trainer.save(directory)                            # and whatever else belongs to it
    commit(run_dir, 10, written)                                # durable bytes, manifest.json, rename, pointer

A crash at any point leaves the iterations that were there before. The order of `commit`: every file and folder fsynced,
manifest.json, the rename to iter_0000010, latest_checkpointed_iteration.txt. The pointer is for Megatron's tools and for
people; `restore` goes by the manifests.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from slime.checkpoint import manifest
from slime.observe.files import fsync_directory, write_atomic
from slime.observe.hashed import File

POINTER = "latest_checkpointed_iteration.txt"
_TEMPORARY, _REPLACED = ".tmp", ".replaced"


def iteration(run_dir: Path, step: int) -> Path:
    """Where the iteration of `step` lies once committed."""
    return run_dir / f"iter_{step:07d}"


def iterations(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of everything that is named like a committed iteration, valid or not, ascending."""
    found = {int(m[1]): p for p in run_dir.glob("iter_*") if p.is_dir() and (m := re.fullmatch(r"iter_(\d{7,})", p.name))}
    return dict(sorted(found.items()))


def begin(run_dir: Path, step: int) -> Path:
    """An empty temporary folder for the files of `step`; what a crashed save left there is removed."""
    directory = _temporary(run_dir, step)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


class GivenUp(RuntimeError):
    """A commit that nobody wants any more, before it became visible."""


def commit(
    run_dir: Path, step: int, written: Mapping[str, File] = MappingProxyType({}), given_up: Callable[[], bool] = lambda: False
) -> Path:
    """Make the folder of `begin` the iteration of `step` and return its final path.

    Reads every file once to hash it; `written` are those whose writers say what they hold, by path relative to the folder. An earlier
    iteration of the same step (of an abandoned continuation) is replaced. Raises OSError where the disk refuses or a file is not what was
    written; the iterations that were there stay as they were. Raises GivenUp where `given_up` says so before the rename.
    """
    temporary, final = _temporary(run_dir, step), iteration(run_dir, step)
    assert temporary.is_dir(), f"commit of step {step} without begin"
    contents = manifest.describe(temporary, step, written)
    _go_on(given_up)
    _fsync_tree(temporary)
    _go_on(given_up)
    manifest.write(temporary, contents)
    manifest.verify(temporary, step=step, content=False)
    _go_on(given_up)
    old = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    fsync_directory(run_dir)
    point_at(run_dir, step)
    if old.exists():
        shutil.rmtree(old)
    return final


def _go_on(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise GivenUp("the run has ended before its save")


def point_at(run_dir: Path, step: int) -> None:
    """Let latest_checkpointed_iteration.txt name `step`."""
    write_atomic(run_dir / POINTER, f"{step}\n")


def clean_up(run_dir: Path) -> None:
    """Undo what a crash left half done: unfinished saves go, an iteration that was about to be replaced comes back."""
    for path in run_dir.glob("iter_*" + _TEMPORARY):
        shutil.rmtree(path)
    for path in run_dir.glob("iter_*" + _REPLACED):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, final)
            fsync_directory(run_dir)


def _temporary(run_dir: Path, step: int) -> Path:
    final = iteration(run_dir, step)
    return final.with_name(final.name + _TEMPORARY)


def _fsync_tree(directory: Path) -> None:
    """Files written by another host are durable there once its rank has closed them; here the driver's own and shared ones."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_directory(Path(folder))
