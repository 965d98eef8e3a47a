"""Builds a run from its recipe: claims the directory, finds the resume point, starts Ray, ranks and engines; ends all of it."""

import fcntl
import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import ray
import yaml

from slime.algorithms.registry import build_algorithm
from slime.checkpoint import batch as batch_file
from slime.checkpoint import restore
from slime.checkpoint.restore import Restored
from slime.cluster.placement import RolePlacement, place
from slime.cluster.preflight import check_resources, check_run_dir
from slime.cluster.session import Cluster, connect
from slime.cluster.signals import StopSignal
from slime.config import SlimeConfig
from slime.config.exits import ConfigError, GateStopped, NothingToDo, SavedRunAgain
from slime.data.ledger import Ledger
from slime.data.source import PromptSource, eval_prompts
from slime.data.template import load_tokenizer
from slime.engine.fleet import EngineFleet
from slime.models.hub import local_directory
from slime.models.registry import load_map
from slime.observe import log as log_files
from slime.observe.console import Console
from slime.observe.metrics import MetricsLog
from slime.observe.report import write_report
from slime.observe.summary import write_summary
from slime.observe.trace import TraceFile
from slime.observe.trackers import start_trackers
from slime.rollout.demonstrations import Demonstrations
from slime.rollout.handle import BatchSource, Pending, Ready, Rollout, RolloutResult
from slime.rollout.replay import Replay
from slime.rollout.rewards.builtin import check_label
from slime.run import Run
from slime.sync.channel import Channel
from slime.trainer.group import TrainerGroup
from slime.types import RolloutSummary, WeightVersion

log = logging.getLogger(__name__)


@contextmanager
def open_run(cfg: SlimeConfig, resolved_yaml: str) -> Iterator[Run]:
    """The run of a recipe, started; summary and report are written and everything is ended when the block ends, however it ends."""
    with ExitStack() as stack:
        directory = Path(cfg.run.dir).resolve() / str(cfg.run.name)
        restored = claim(cfg, directory, stack)
        console = Console(steps=cfg.run.steps, progress=cfg.observe.progress)
        stack.callback(console.stop)
        log_files.set_up(directory, console.warning)
        (directory / "config.yaml").write_text(resolved_yaml)
        signal = stack.enter_context(StopSignal(cfg.run.grace_s))
        console.start(f"slime {cfg.run.name}", facts(cfg, directory, restored))
        cfg = on_disk(cfg)
        check_inputs(cfg)
        cluster = stack.enter_context(connect(cfg, directory))
        run = build(cfg, directory, yaml.safe_load(resolved_yaml), restored, cluster, console, signal, stack)
        try:
            yield run
        except BaseException as error:
            end(run, *ending(error))
            raise
        end(run, "done")


def end(run: Run, status: str, reason: str = "") -> None:
    """Write how the run ended, and the report of it."""
    summary = run.summary(status, reason)
    write_summary(run.directory, summary)
    write_report(run.directory)
    run.console.close(summary)


def ending(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that an exception ended."""
    status = "saved" if isinstance(error, SavedRunAgain) else "stopped" if isinstance(error, GateStopped) else "failed"
    return status, str(error) or type(error).__name__


# --- the directory ------------------------------------------------------------------------------------------------------


def claim(cfg: SlimeConfig, directory: Path, stack: ExitStack) -> Restored | None:
    """Make the directory this process's own and find what it resumes from, None for a fresh start.

    Raises ConfigError where run.resume forbids what is there, NothingToDo where all steps are complete.
    """
    mode = cfg.run.resume
    if mode == "never" and (directory / "metrics.jsonl").exists():
        raise ConfigError(f"run.resume=never and {directory} holds a run already; choose another run.name or run.resume=auto")
    directory.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((directory / ".lock").open("w"))
    _lock(lock, directory)
    if mode in ("auto", "must", "never"):
        restored = restore.newest(directory)
    else:
        path = Path(mode)
        restored = restore.newest(path) if not path.name.startswith("iter_") else _named(path)
    if restored is None and mode not in ("auto", "never"):
        where = directory if mode == "must" else mode
        raise ConfigError(f"run.resume={mode}: there is no checkpoint in {where}; use run.resume=auto to start anew")
    if restored is not None and restored.step >= cfg.run.steps:
        raise NothingToDo(f"{directory} has completed {restored.step} updates and run.steps={cfg.run.steps}; raise run.steps to go on")
    return restored


def _lock(file: IO[str], directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{directory} belongs to a run that is going on; stop it or choose another run.name") from error


def _named(path: Path) -> Restored:
    state = restore.validate(path)
    return Restored(state.step, path, state, ())


def facts(cfg: SlimeConfig, directory: Path, restored: Restored | None) -> dict[str, str]:
    """What the console says at the start."""
    said = {
        "model": f"{cfg.model.path} ({cfg.model.dtype})",
        "data": ", ".join(f.path for f in cfg.data.train),
        "algorithm": f"{cfg.algorithm.name}, {cfg.run.steps} updates of {cfg.rollout.prompts_per_step} prompts",
        "directory": str(directory),
    }
    if restored is not None:
        said["resumes"] = str(restored.path)
        for refused in restored.refused:
            log.warning("refused %s", refused)
    return said


def on_disk(cfg: SlimeConfig) -> SlimeConfig:
    """The recipe with absolute paths: ranks and engines of a joined cluster start in other folders. A model on the hub is downloaded.

    Links are followed, so that a run keeps its model and data when a link is pointed elsewhere. Raises ValueError naming model.path.
    """
    train = [replace(file, path=str(Path(file.path).resolve())) for file in cfg.data.train]
    sets = {name: replace(s, path=str(Path(s.path).resolve())) for name, s in cfg.data.eval.items()}
    model = replace(cfg.model, path=str(local_directory(cfg.model.path).resolve()))
    return replace(cfg, model=model, data=replace(cfg.data, train=train, eval=sets))


def check_inputs(cfg: SlimeConfig) -> None:
    """Open what the recipe names, so that a bad file is an error before anything starts. Raises ValueError naming the knob."""
    load_map(cfg.model.path, cfg.model.family, cfg.trainer.tensor_parallel)
    load_tokenizer(cfg.model)
    judged = build_algorithm(cfg.algorithm).needs_rollouts
    for prompt in PromptSource(cfg.data, cfg.run.seed).first if cfg.run.only != "train" else []:
        if judged:
            check_label(cfg.reward, None, prompt)
    for name, eval_set in cfg.data.eval.items():
        prompts = eval_prompts(name, eval_set, cfg.data)
        if judged:
            check_label(cfg.reward, eval_set.reward, prompts[0])


# --- the parts ----------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What is started on the cluster."""

    trainer: TrainerGroup | None
    fleet: EngineFleet | None
    source: BatchSource


def build(
    cfg: SlimeConfig,
    directory: Path,
    resolved: dict,
    restored: Restored | None,
    cluster: Cluster,
    console: Console,
    signal: StopSignal,
    stack: ExitStack,
) -> Run:
    """Start everything and put the run together, in the state of the resume point."""
    version = next_version(restored)
    check_resources(cfg, cluster)
    placements = place(cfg, cluster)
    check_run_dir(placements, directory)
    parts = start_parts(cfg, directory, version, placements, stack)
    ledger, restored_batch, wall_s = Ledger(), None, 0.0
    if restored is None:
        for stale in ("metrics.jsonl", "examples.jsonl", "trace.json.gz"):
            (directory / stale).unlink(missing_ok=True)
    elif restored.path.parent != directory:
        shutil.copy(restored.path.parent / "metrics.jsonl", directory)
    metrics = MetricsLog(directory / "metrics.jsonl")
    if restored is not None:
        assert parts.trainer is not None
        parts.trainer.load(restored.path / "trainer")
        metrics.truncate(restored.step)
        ledger, wall_s = Ledger.from_dict(restored.state.ledger), restored.state.wall_s
        restored_batch = read_batch(restored)
    ids = restored.state.trackers if restored else {}
    trackers = start_trackers(cfg.observe, directory, str(cfg.run.name), resolved, ids=ids, first_step=version.number + bool(restored))
    stack.callback(trackers.close)
    return Run(
        cfg=cfg,
        directory=directory,
        resolved=resolved,
        version=version,
        ledger=ledger,
        ranks=parts.trainer,
        rollout=parts.source,
        channel=Channel(cfg.sync, parts.trainer, parts.fleet, version),
        console=console,
        metrics=metrics,
        trackers=trackers,
        trace=TraceFile(directory / "trace.json.gz"),
        signal=signal,
        fleet=parts.fleet,
        restored_batch=restored_batch,
        wall_before_s=wall_s,
    )


def next_version(restored: Restored | None) -> WeightVersion:
    """The version that this process begins with: a resume bumps the epoch, so that no engine takes old weights for new ones."""
    if restored is None:
        return WeightVersion(0, 0, secrets.token_hex(4))
    saved = restored.state.version
    return WeightVersion(saved.epoch + 1, restored.step, saved.run_id)


def read_batch(restored: Restored) -> Pending | None:
    """The finished batch that the checkpoint holds."""
    batch = batch_file.read_batch(restored.path)
    if batch is None:
        return None
    summary = RolloutSummary.from_dict(json.loads((restored.path / "rollout.json").read_text()))
    return Ready(restored.step, RolloutResult(ray.put(batch), summary))


def start_parts(cfg: SlimeConfig, directory: Path, version: WeightVersion, placements: dict[str, RolePlacement], stack: ExitStack) -> Parts:
    """Start ranks, engines and the rollout manager side by side. Raises what any of them raises; the others are ended."""
    serves = cfg.run.only != "train" and build_algorithm(cfg.algorithm).needs_rollouts

    def start_trainer() -> TrainerGroup | None:
        return TrainerGroup.start(cfg, placements["actor"]) if "actor" in placements else None

    def start_fleet() -> EngineFleet | None:
        return EngineFleet.start(cfg, placements.get("rollout"), directory, version.run_id) if serves else None

    rollout = Rollout.launch(cfg, directory) if serves else None
    if rollout is not None:
        stack.callback(rollout.stop)
    with ThreadPoolExecutor(2) as pool:
        starting = (pool.submit(start_trainer), pool.submit(start_fleet))
    for future in starting:
        if future.exception() is None and (started := future.result()) is not None:
            stack.callback(started.stop)
    trainer, fleet = starting[0].result(), starting[1].result()
    source: BatchSource
    if fleet is not None and rollout is not None:
        rollout.connect(fleet.endpoints(), load_map(cfg.model.path, cfg.model.family).vocab_size)
        source = rollout
    else:
        source = Replay(Path(cfg.run.replay)) if cfg.run.replay else Demonstrations(cfg)
    return Parts(trainer, fleet, source)
