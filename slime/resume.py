"""A run's directory and the point it resumes from: decided before anything is started.

run.resume=auto     the newest whole checkpoint of the run's own directory, a fresh start where there is none
run.resume=must     the same, an error where there is none
run.resume=never    a directory that holds no run yet
run.resume=PATH     where the run *begins*: a checkpoint, or the newest of a run. From its own first commit on, the run resumes its own.
"""

import fcntl
import json
import logging
import secrets
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from slime.checkpoint import restore
from slime.checkpoint.origin import Origin
from slime.checkpoint.restore import Restored
from slime.checkpoint.save import iterations
from slime.config import SlimeConfig
from slime.config.changes import Change, Kind, changes
from slime.config.exits import ConfigError, NothingToDo
from slime.observe import account, density, summary
from slime.observe.files import write_atomic
from slime.types import WeightVersion

log = logging.getLogger(__name__)

METRICS, EXAMPLES, LEDGER, DENSITY, TRACE = "metrics.jsonl", "examples.jsonl", account.NAME, density.NAME, "trace.json.gz"
EPOCH = "epoch"


def claim(cfg: SlimeConfig, directory: Path, stack: ExitStack) -> Restored | None:
    """Make the directory this process's own and find what the run goes on from, None for a fresh start.

    Raises ConfigError where run.resume forbids what is there or another driver has the directory, NothingToDo where the run is done,
    InvalidCheckpoint where no checkpoint of the run is whole.
    """
    mode = cfg.run.resume
    if mode == "never" and ((directory / METRICS).exists() or iterations(directory)):
        raise ConfigError(f"run.resume=never and {directory} holds a run already; choose another run.name or run.resume=auto")
    directory.mkdir(parents=True, exist_ok=True)
    _lock(stack.enter_context((directory / ".lock").open("w")), directory)
    restored = restore.newest(directory)
    if mode not in ("auto", "must", "never"):
        restored = _beginning(Path(mode).resolve(), mode, restored, directory)
    if restored is None and mode == "must":
        raise ConfigError(f"run.resume=must: there is no checkpoint in {directory}; use run.resume=auto to start anew")
    if restored is not None:
        _check_step(cfg, restored, directory)
    return restored


def is_own(restored: Restored, directory: Path) -> bool:
    """Whether a checkpoint is the run's own, not that of a run it begins from."""
    return restored.path.parent == directory


def check_recipe(restored: Restored, directory: Path, resolved: dict[str, Any]) -> None:
    """Compare the recipe with the checkpoint's: differences are told. Raises ConfigError naming all those that a run cannot go on with and
    run.accept_changes does not name (slime.config.changes)."""
    own = is_own(restored, directory)
    found = changes(restored.state.config, resolved)
    strict = (Kind.PROMPTS, Kind.COURSE) if own else (Kind.PROMPTS,)
    named = resolved["run"].get("accept_changes", [])
    refused = [change for change in found if change.kind in strict and not change.accepted(named)]
    if refused:
        raise ConfigError(_refusal(refused, named, restored))
    if found:
        what = "resumes with another recipe" if own else f"begins from {restored.path} with another recipe"
        log.warning("%s: %s", what, "; ".join(map(str, found)))


def check_origin(restored: Restored, cfg: SlimeConfig, origin: Origin) -> None:
    """Compare code and data with the checkpoint's. Other versions are told; raises ConfigError for data files of another content, unless
    run.accept_changes names data.train. A file may have moved."""
    before, now = restored.state.origin.code, origin.code
    names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    if names:
        other = "; ".join(f"{n} {before.get(n, 'none')} -> {now.get(n, 'none')}" for n in names)
        log.warning("%s was made with other code: %s", restored.path, other)
    if "data.train" in cfg.run.accept_changes:
        return
    for at, (was, file) in enumerate(zip(restored.state.origin.data, origin.data, strict=False)):  # another number is another recipe
        if not was.same_content(file):
            size = f"{was.bytes} bytes then, {file.bytes} now" if was.bytes != file.bytes else "as many bytes, but others"
            raise ConfigError(
                f"data.train.{at}.path={file.path}: its content is not that of {was.path} when {restored.path} was made ({size}): "
                "prompts would be repeated and skipped. Restore the file, name it in run.accept_changes='[data.train]' to go on all the "
                f"same, or {_anew(restored)}"
            )


def _refusal(refused: list[Change], named: list[str], restored: Restored) -> str:
    prompts = "Prompts would be repeated and skipped. " if any(change.kind is Kind.PROMPTS for change in refused) else ""
    accepting = ",".join([*named, *(change.name for change in refused)])
    listed = "".join(f"\n    {change}" for change in refused) if len(refused) > 1 else str(refused[0])
    return (
        f"{restored.path} was made with another recipe: {listed}\n{prompts}Set {'it' if len(refused) == 1 else 'them'} "
        f"back, add run.accept_changes='[{accepting}]' to go on all the same, or {_anew(restored)}"
    )


def _anew(restored: Restored) -> str:
    return f"start a new run.name from the weights alone: model.path={restored.path.parent}/hf"


def next_version(restored: Restored | None, directory: Path) -> WeightVersion:
    """The version that this process begins with, whose epoch is taken: no later start gets it, also where this one saves nothing. So no
    engine takes old weights for new ones. A run that begins from another's checkpoint is a run of its own.

    Raises ConfigError where the record of epochs is damaged.
    """
    if restored is None or not is_own(restored, directory):
        version = WeightVersion(0, 0 if restored is None else restored.step, secrets.token_hex(4))
    else:
        saved = restored.state.version
        version = WeightVersion(max(saved.epoch, _taken(directory, saved.run_id)) + 1, restored.step, saved.run_id)
    take_epoch(directory, version)
    return version


def take_epoch(directory: Path, version: WeightVersion) -> None:
    """Write down, durably, that this epoch of the run is used; before anything of it is published."""
    write_atomic(directory / EPOCH, json.dumps({"run_id": version.run_id, "epoch": version.epoch}) + "\n")


def _taken(directory: Path, run_id: str) -> int:
    """The last epoch that a start of the run has taken; -1 where there is no record of it."""
    path = directory / EPOCH
    try:
        record = json.loads(path.read_text())
        taken, of = int(record["epoch"]), str(record["run_id"])
    except FileNotFoundError:
        return -1
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): it says which epoch of the run was used last. Write "
            f'{{"run_id": "{run_id}", "epoch": N}} into it, N at least the number of starts, or choose another run.name'
        ) from error
    return taken if of == run_id else -1


def prepare_files(directory: Path, restored: Restored | None) -> None:
    """Bring the directory's records to the resume point: nothing of what comes after it stays. Raises ConfigError where there are none."""
    (directory / summary.NAME).unlink(missing_ok=True)
    if restored is None:
        if (directory / METRICS).exists():
            log.warning("%s holds no checkpoint: the run begins anew, its earlier records are replaced", directory)
        for stale in (METRICS, EXAMPLES, LEDGER, DENSITY, TRACE):
            (directory / stale).unlink(missing_ok=True)
        return
    for record in (restored.path.parent / METRICS, restored.path.parent / LEDGER):
        if not record.is_file():
            raise ConfigError(f"{record} is missing: {restored.path} needs the record of its run beside it; copy it there")
        if not is_own(restored, directory):
            shutil.copy(record, directory)
    if not is_own(restored, directory):
        return
    if (directory / DENSITY).exists():
        density.DensityLog(directory / DENSITY).truncate(restored.step)
    if (examples := directory / EXAMPLES).exists():
        whole, newline, _ = examples.read_text().rpartition("\n")  # a last line that a crash cut off goes
        kept = [line for line in (whole + newline).splitlines(keepends=True) if json.loads(line)["step"] <= restored.step]
        write_atomic(examples, "".join(kept))


def write_recipe(directory: Path, resolved_yaml: str, restored: Restored | None) -> None:
    """Write config.yaml. One that a resume changes is kept beside it, under the step to which it was followed."""
    path = directory / "config.yaml"
    if restored is not None and path.exists() and path.read_text() != resolved_yaml:
        path.rename(directory / f"config_to_{restored.step:07d}.yaml")
    path.write_text(resolved_yaml)


def _lock(file: IO[str], directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{directory} belongs to a run that is going on; stop it or choose another run.name") from error


def _beginning(path: Path, mode: str, own: Restored | None, directory: Path) -> Restored:
    """The run's own checkpoint once there is one, else that of `path`, which is only read: a run may be going on there."""
    if path == directory or path.parent == directory:
        if own is None or path not in (directory, own.path):
            raise ConfigError(f"run.resume={mode} is not the newest checkpoint of this run; begin from it under another run.name")
        return own
    if own is not None:
        return own
    if path.name.startswith("iter_"):
        state = restore.validate(path)
        return Restored(state.step, path, state, ())
    found = restore.newest(path, mend=False)
    if found is None:
        raise ConfigError(f"run.resume={mode}: there is no checkpoint in {path}; use run.resume=auto to start anew")
    return found


def _check_step(cfg: SlimeConfig, restored: Restored, directory: Path) -> None:
    """A run that has its last update but was killed before its model was exported is not done."""
    if cfg.run.only == "rollout":
        raise ConfigError(
            f"run.only=rollout generates with the weights of model.path and cannot go on from {restored.path}; "
            f"choose another run.name and model.path={restored.path.parent}/hf"
        )
    ended = summary.read_summary(directory)
    done = ended is not None and ended.status == "done" and ended.steps >= restored.step
    if restored.step >= cfg.run.steps and (done or not is_own(restored, directory)):
        raise NothingToDo(f"{restored.path.parent} has completed {restored.step} updates and run.steps={cfg.run.steps}; raise run.steps")
