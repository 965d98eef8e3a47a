"""Dashboards: Weights & Biases and TensorBoard, all fed the dictionary that goes to metrics.jsonl.

A tracker that cannot start ends the run there, with the knob that turns it off. One that fails later does not: its error
is warned of once, it gets nothing more, and `Trackers.failed` counts the steps it lacks; metrics.jsonl has them all.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from slime.config import ObserveConfig

log = logging.getLogger(__name__)

PROJECT = "slime"  # of Weights & Biases, where its own WANDB_PROJECT names none


class Tracker(Protocol):
    """One dashboard. A constructor raises ValueError naming the knob; later calls raise what `errors` lists."""

    name: str
    errors: tuple[type[Exception], ...]  # how this dashboard fails; anything else is a bug and ends the run

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def id(self) -> str:
        """What this tracker needs to carry on after a resume; may be empty."""
        ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases. Every metric is drawn over `step`, never over the number of calls.

    A resumed run keeps its id: online it carries on the same run; offline it adds a folder under wandb/ with that id, and `wandb sync` of
    all of them in one call joins them, in order. Steps that are trained again after a crash are logged again, under the same `step`.
    """

    name = "wandb"

    def __init__(self, cfg: ObserveConfig, run_dir: Path, run_name: str, config: Mapping[str, Any], run_id: str = "") -> None:
        import wandb

        assert cfg.wandb != "off"
        self.errors: tuple[type[Exception], ...] = (wandb.errors.Error, OSError)
        self._id = run_id or secrets.token_hex(4)
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True)
        try:
            self._run = wandb.init(
                mode=cfg.wandb,  # type: ignore[arg-type]
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=run_name,
                id=self._id,
                resume="allow" if cfg.wandb == "online" else None,
                dir=run_dir,
                config=dict(config),
                settings=settings,
            )
        except self.errors as error:
            raise ValueError(f"observe.wandb={cfg.wandb} cannot start: {error}. Use observe.wandb=offline, or off") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def id(self) -> str:
        return self._id

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # finish alone may return before an offline run's file is whole


class TensorboardTracker:
    """TensorBoard events in <run_dir>/tensorboard; a resumed run purges the steps it is about to train again."""

    name = "tensorboard"
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        except OSError as error:
            raise ValueError(f"observe.tensorboard=true cannot start: {error}. Use observe.tensorboard=false") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def id(self) -> str:
        return ""

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All dashboards of a run."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._all = list(trackers)
        self.failed: dict[str, int] = {}  # tracker -> steps that it lacks

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one step to every tracker that has not failed."""
        for tracker in self._all:
            if tracker.name in self.failed:
                self.failed[tracker.name] += 1
                continue
            try:
                tracker.log(step, metrics)
            except tracker.errors as error:
                self.failed[tracker.name] = 1
                log.warning("%s failed at step %d and gets nothing more (metrics.jsonl has it all): %s", tracker.name, step, error)

    def ids(self) -> dict[str, str]:
        """Tracker -> id, for the checkpoint."""
        return {t.name: t.id() for t in self._all if t.id()}

    def close(self) -> None:
        """Flush and end all; says which lack steps."""
        for tracker in self._all:
            try:
                tracker.close()
            except tracker.errors as error:
                log.warning("%s could not be closed: %s", tracker.name, error)
        for name, steps in self.failed.items():
            log.warning("%s lacks %d steps", name, steps)


def start_trackers(
    cfg: ObserveConfig, run_dir: Path, run_name: str, config: Mapping[str, Any], *, ids: Mapping[str, str], first_step: int
) -> Trackers:
    """Start what `cfg` asks for. `ids` are those of the checkpoint ({} for a fresh run), `first_step` is the first that will be logged.

    Raises ValueError naming the knob where a tracker cannot start.
    """
    trackers: list[Tracker] = []
    if cfg.wandb != "off":
        trackers.append(WandbTracker(cfg, run_dir, run_name, config, ids.get("wandb", "")))
    if cfg.tensorboard:
        trackers.append(TensorboardTracker(run_dir, first_step))
    return Trackers(trackers)
