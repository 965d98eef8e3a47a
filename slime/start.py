"""Builds a run from its recipe: opens what it names, starts Ray, ranks and engines; ends all of it."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml

from slime.checkpoint import batch as batch_file
from slime.checkpoint.origin import Origin, origin_of
from slime.checkpoint.restore import Restored
from slime.checkpoint.saver import Saver
from slime.cluster.gpus import device_bytes
from slime.cluster.placement import RolePlacement, place
from slime.cluster.preflight import check_resources, check_run_dir
from slime.cluster.session import Cluster, connect
from slime.cluster.signals import StopSignal
from slime.cluster.tenancy import ENGINES, TRAINER, Tenancy
from slime.config import SlimeConfig
from slime.config.checks import check_device
from slime.config.exits import GateStopped, SavedRunAgain
from slime.config.plan import plan
from slime.config.plan_share import with_fraction
from slime.config.roles import TEACHER, generates, needed_roles, needs_rollouts, served_teachers, shares, swaps
from slime.data.ledger import Ledger
from slime.data.source import PromptSource, eval_prompts
from slime.data.teachers import check_vocabulary, same_vocabulary, teacher_of
from slime.data.template import check_tokenizer
from slime.engine import teacher_fleet
from slime.engine.fleet import EngineFleet
from slime.models.check_layout import check_critic, check_model, check_teacher
from slime.models.hub import local_directory
from slime.models.registry import load_map
from slime.observe import density
from slime.observe import log as log_files
from slime.observe.account import AccountLog
from slime.observe.console import Console
from slime.observe.density import DensityLog
from slime.observe.metrics import MetricsLog
from slime.observe.report import write_report
from slime.observe.summary import Summary, write_summary
from slime.observe.trace import TraceFile
from slime.observe.trackers import start_trackers
from slime.resume import LEDGER, check_origin, check_recipe, claim, is_own, next_version, prepare_files, take_epoch, write_recipe
from slime.rollout.demonstrations import Demonstrations
from slime.rollout.handle import BatchSource, Pending, Ready, Rollout, RolloutResult
from slime.rollout.replay import Replay
from slime.rollout.rewards.builtin import check_label
from slime.run import Run
from slime.sync.channel import Channel
from slime.trainer.group import TrainerGroup
from slime.types import RolloutSummary, WeightVersion

log = logging.getLogger(__name__)

RANKS, FLEET = "ranks", "fleet"  # what starts


@contextmanager
def open_run(cfg: SlimeConfig, resolved_yaml: str, signal: StopSignal) -> Iterator[Run]:
    """The run of a recipe, started; summary and report are written and everything is ended when the block ends, however it ends.

    Raises ConfigError, PreflightError or ValueError where it cannot start, NothingToDo, and what the block raises; there, a ValueError
    becomes a RuntimeError, since the recipe was accepted and work was done.
    """
    resolved = yaml.safe_load(resolved_yaml)
    with ExitStack() as stack:
        cfg = on_disk(cfg)
        check_inputs(cfg)
        directory = Path(cfg.run.dir).resolve() / str(cfg.run.name)
        restored = claim(cfg, directory, stack)
        console = Console(steps=cfg.run.steps)
        stack.callback(console.stop)
        log_files.set_up(directory, console.warning)
        console.start(f"slime {cfg.run.name}", facts(cfg, directory, restored))
        warn_of_nucleus(cfg)
        origin = origin_of(cfg)
        if restored is not None:
            check_recipe(restored, directory, resolved)
            check_origin(restored, cfg, origin)
        prepare_files(directory, restored)
        write_recipe(directory, resolved_yaml, restored)
        try:
            cluster = stack.enter_context(connect(cfg, directory))
            run = build(cfg, directory, resolved, restored, origin, cluster, console, signal, stack)
        except BaseException as error:
            write_summary(directory, Summary("failed", restored.step if restored else 0, 0.0, reason=reason_of(error)))
            raise
        try:
            yield run
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, SavedRunAgain):
                run.settle()
            signal.leave()
            end(run, status_of(error), reason_of(error))
            if isinstance(error, ValueError):
                raise RuntimeError(str(error)) from error
            raise
        end(run, "done")


def end(run: Run, status: str, reason: str = "") -> None:
    """Write how the run ended, and the report of it, which must not hide the reason."""
    summary = run.summary(status, reason)
    write_summary(run.directory, summary)
    try:
        write_report(run.directory)
    except (OSError, ValueError) as error:
        log.warning("report.html could not be written: %s", error)
    run.console.close(summary)


def status_of(error: BaseException) -> str:
    """The status of a run that an exception ended."""
    return "saved" if isinstance(error, SavedRunAgain) else "stopped" if isinstance(error, GateStopped) else "failed"


def reason_of(error: BaseException) -> str:
    """What a summary says of it."""
    return str(error) or type(error).__name__


def facts(cfg: SlimeConfig, directory: Path, restored: Restored | None) -> dict[str, str]:
    """What the console says at the start."""
    said = {
        "model": f"{cfg.model.path} ({cfg.model.dtype})",
        "data": ", ".join(f.path for f in cfg.data.train),
        "algorithm": f"{cfg.algorithm.name}, {cfg.run.steps} updates of {cfg.rollout.prompts_per_step} prompts",
        "directory": str(directory),
    }
    if cfg.run.only != "all":
        said["only"] = {"rollout": "rollouts are dumped, nothing is trained", "train": f"on the rollouts of {cfg.run.replay}, no engines"}[
            cfg.run.only
        ]
    if restored is not None:
        said["resumes"] = str(restored.path)
        for refused in restored.refused:
            log.warning("refused %s", refused)
    return said


def warn_of_nucleus(cfg: SlimeConfig) -> None:
    """Say that a run trains on tokens of rollout.top_p. SGLang's log-probs are from before that filter, as the trainer's are."""
    if cfg.rollout.top_p < 1 and needs_rollouts(cfg.algorithm) and "actor" in needed_roles(cfg):
        log.warning(
            "rollout.top_p=%g: tokens are drawn from the nucleus, but log-probs of engines and trainer are of the whole distribution: "
            "ratios, KL and importance weights are approximate",
            cfg.rollout.top_p,
        )


def on_disk(cfg: SlimeConfig) -> SlimeConfig:
    """The recipe with absolute paths: ranks and engines of a joined cluster start in other folders. A model on the hub is downloaded.

    Links are followed, so that a run keeps its model and data when a link is pointed elsewhere. Raises ValueError naming model.path.
    """
    train = [replace(file, path=str(Path(file.path).resolve())) for file in cfg.data.train]
    sets = {name: replace(s, path=str(Path(s.path).resolve())) for name, s in cfg.data.eval.items()}
    model = replace(cfg.model, path=str(local_directory(cfg.model.path).resolve()))
    teachers = {
        name: replace(teacher, path=str(local_directory(teacher.path, f"algorithm.teachers.{name}.path").resolve()))
        for name, teacher in cfg.algorithm.teachers.items()
    }
    algorithm = replace(cfg.algorithm, teachers=teachers)
    critic = cfg.critic.path and str(local_directory(cfg.critic.path, "critic.path").resolve())
    url = cfg.sync.url and (cfg.sync.url if "://" in cfg.sync.url else str(Path(cfg.sync.url).resolve()))
    sync, join = replace(cfg.sync, url=url), cfg.rollout.join and str(Path(cfg.rollout.join).resolve())
    data, rollout = replace(cfg.data, train=train, eval=sets), replace(cfg.rollout, join=join)
    return replace(cfg, model=model, algorithm=algorithm, critic=replace(cfg.critic, path=critic), sync=sync, rollout=rollout, data=data)


def check_inputs(cfg: SlimeConfig) -> None:
    """Open what the recipe names, so that a bad file is an error before anything starts. Raises ValueError naming the knob."""
    check_model(cfg)
    check_tokenizer(cfg.model)
    check_teachers(cfg)
    if cfg.critic.path is not None and "actor" in needed_roles(cfg):
        same_vocabulary(cfg.model, cfg.critic.path, "critic.path", "critic")
        check_critic(cfg)
    judged = needs_rollouts(cfg.algorithm)
    for prompt in PromptSource(cfg.data, cfg.run.seed).first if cfg.run.only != "train" else []:
        teacher_of(prompt.source, cfg.algorithm)
        if judged:
            check_label(cfg.reward, None, prompt)
    for name, eval_set in cfg.data.eval.items():
        prompts = eval_prompts(name, eval_set, cfg.data)
        if judged:
            check_label(cfg.reward, eval_set.reward, prompts[0], f"data.eval.{name}.reward")


def check_teachers(cfg: SlimeConfig) -> None:
    """Raises ValueError for a teacher that does not share the student's vocabulary, or that the actor's ranks cannot hold."""
    for name, teacher in cfg.algorithm.teachers.items():
        check_vocabulary(cfg.model, name, teacher.path)
        if name not in served_teachers(cfg) and "actor" in needed_roles(cfg):
            check_teacher(cfg, name)


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
    origin: Origin,
    cluster: Cluster,
    console: Console,
    signal: StopSignal,
    stack: ExitStack,
) -> Run:
    """Start everything and put the run together, in the state of the resume point."""
    version = next_version(restored, directory)
    check_device(cfg, cluster.device)
    check_resources(cfg, cluster)
    placements = place(cfg, cluster)
    check_run_dir(placements, directory)
    parts = start_parts(cfg, directory, version, placements, stack)
    tenancy = Tenancy({TRAINER: parts.trainer, ENGINES: parts.fleet} if swaps(cfg) and parts.trainer and parts.fleet else {})
    channel = Channel(cfg.sync, parts.trainer, parts.fleet, version, directory / "weights", away=bool(tenancy.tenants))
    stack.callback(channel.close)
    version = replace(version, epoch=channel.open(between=lambda: tenancy.have(TRAINER)))
    take_epoch(directory, version)  # a store may know of later ones
    ledger, restored_batch, wall_s = Ledger(), None, 0.0
    metrics, account = MetricsLog(directory / "metrics.jsonl"), AccountLog(directory / LEDGER)
    if restored is not None:
        assert parts.trainer is not None
        parts.trainer.load(restored.path)
        metrics.truncate(restored.step)
        account.truncate(restored.step)
        ledger, wall_s = Ledger.from_dict(restored.state.ledger), restored.state.wall_s
        restored_batch = read_batch(restored)
        if restored_batch is not None and isinstance(parts.source, Replay) and parts.source.is_file:
            ledger.set_aside(restored_batch.result().summary)  # the file's batch comes next, not this one
            restored_batch = None
        signal.committed = restored.path
    own = restored is not None and is_own(restored, directory)
    ids = restored.state.trackers if restored is not None and own else {}
    saver = Saver(directory, cfg.run.keep_last, cfg.run.keep_every, cfg.cluster.step_timeout_s)
    stack.callback(saver.close)
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
        channel=channel,
        console=console,
        metrics=metrics,
        account=account,
        density=DensityLog(directory / density.NAME),
        trackers=trackers,
        trace=TraceFile(directory / "trace.json.gz"),
        signal=signal,
        saver=saver,
        origin=origin,
        begins_from=restored.path if restored is not None and not own else None,
        fleet=parts.fleet,
        tenancy=tenancy,
        restored_batch=restored_batch,
        saved=version.number if own else -1,
        wall_before_s=wall_s,
    )


def read_batch(restored: Restored) -> Pending[RolloutResult] | None:
    """The finished batch that the checkpoint holds."""
    batch = batch_file.read_batch(restored.path)
    if batch is None:
        return None
    summary = RolloutSummary.from_dict(json.loads((restored.path / "rollout.json").read_text()))
    return Ready(restored.step, RolloutResult(ray.put(batch), summary))


def start_parts(cfg: SlimeConfig, directory: Path, version: WeightVersion, placements: dict[str, RolePlacement], stack: ExitStack) -> Parts:
    """Start ranks, engines and the rollout manager side by side. Raises what any of them raises; the others are ended.

    On shared devices one starts after the other. SGLang takes a fraction of the memory that it finds free: with cluster.share=split it
    comes first; with swap the ranks do, and have given their memory away when it comes.
    """
    serves, share = generates(cfg), cfg.cluster.share if shares(cfg) else "none"
    of_engines = divided(cfg, placements) if share != "none" else cfg

    def start_trainer() -> TrainerGroup | None:
        if share == "split":
            starting[FLEET].result()
        return TrainerGroup.start(cfg, placements["actor"], placements.get("critic")) if "actor" in placements else None

    def start_fleet() -> EngineFleet | None:
        if share == "swap" and (trainer := starting[RANKS].result()) is not None:
            trainer.leave()
        return EngineFleet.start(of_engines, placements.get("rollout"), directory, version.run_id) if serves else None

    def start_teacher(role: str) -> EngineFleet:
        return teacher_fleet.start_teacher(cfg, role.removeprefix(TEACHER), placements[role], directory, version.run_id)

    starting: dict[str, Future[Any]] = {}
    teaching = [role for role in placements if role.startswith(TEACHER)]
    rollout = Rollout.launch(cfg, directory) if serves else None
    if rollout is not None:
        stack.callback(rollout.stop)
    with ThreadPoolExecutor(2 + len(teaching)) as pool:
        first, second = (FLEET, RANKS) if share == "split" else (RANKS, FLEET)
        starts: dict[str, Callable[[], Any]] = {RANKS: start_trainer, FLEET: start_fleet}
        starting[first] = pool.submit(starts[first])
        starting[second] = pool.submit(starts[second])
        teachers = {role.removeprefix(TEACHER): pool.submit(start_teacher, role) for role in teaching}
        written = None if serves else pool.submit(written_batches, cfg)
    futures: list[Future[Any]] = [*starting.values(), *teachers.values()]
    for future in futures:
        if future.exception() is None and (started := future.result()) is not None:
            stack.callback(started.stop)
    trainer, fleet = starting[RANKS].result(), starting[FLEET].result()
    if written is not None:
        return Parts(trainer, fleet, written.result())
    assert fleet is not None and rollout is not None
    model = load_map(cfg.model.path, cfg.model.family)
    servers = teacher_fleet.endpoints(cfg, {name: future.result() for name, future in teachers.items()})
    rollout.connect(fleet.endpoints(), model.vocab_size, model.routing if cfg.rollout.replay_experts else None, servers)
    return Parts(trainer, fleet, rollout)


def divided(cfg: SlimeConfig, placements: dict[str, RolePlacement]) -> SlimeConfig:
    """The recipe with the part of a shared GPU that engines take stated. Raises ConfigError where a rank and an engine do not fit, naming
    the knob, PreflightError where a GPU's memory is not known."""
    shared = plan(cfg).shared
    device = None if shared is None else device_bytes(placements["rollout"])
    return cfg if shared is None or device is None else with_fraction(cfg, shared.fit(device))


def written_batches(cfg: SlimeConfig) -> BatchSource:
    """The source of a run without engines."""
    return Replay(Path(cfg.run.replay)) if cfg.run.replay else Demonstrations(cfg)
