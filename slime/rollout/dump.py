"""Rollouts on disk: rollout.dump writes them, and so does a run that a batch has stopped; run.replay reads them.

rollouts/step_0000003.npz holds the columns of the batch, bit for bit; step_0000003.jsonl the account and then one readable sample a line.
stopped/ holds, in the same form, a batch that stopped the run, its account with the reason; or the samples whose rewards did.
"""

import json
import shlex
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slime.types import Batch, Group, RolloutSummary, Sample

FOLDER = "rollouts"
STOPPED = "stopped"
IN_COLUMNS = ("experts", "signal")


def write_rollout(run_dir: Path, batch: Batch, summary: RolloutSummary, groups: list[Group]) -> None:
    """Write one step's batch and samples."""
    _write(run_dir / FOLDER / f"step_{summary.step:07d}", batch, summary.to_dict(), (s for g in groups for s in g.samples))


def write_stopped(run_dir: Path, step: int, batch: Batch, summary: RolloutSummary, reason: str) -> Path:
    """Write the batch that stopped the run in the update after `step`, and why; returns what run.replay takes."""
    return _write(run_dir / STOPPED / f"step_{step:07d}", batch, {**summary.to_dict(), "reason": reason}, ())


def write_failed_rewards(run_dir: Path, step: int, samples: list[Sample]) -> Path:
    """Write the samples of a step that were judged before so many rewards had failed that the run stops, those that failed first."""
    path = run_dir / STOPPED / f"step_{step:07d}_rewards.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as text:
        text.writelines(_readable(s) for s in sorted(samples, key=lambda s: s.reward_error is None))
    return path


def replay_command(batch: Path, run_dir: Path, saved: int | None) -> str:
    """What a user types to train on the batch of `write_stopped` alone, from the run's last checkpoint (`saved`, its step; None where it
    has none). It is a run of its own, so that the one that was stopped stays as it is."""
    begins = [] if saved is None else [f"run.resume={run_dir}"]
    options = [f"run.name={run_dir.name}-replay", "run.only=train", f"run.replay={batch}", *begins, f"run.steps={(saved or 0) + 1}"]
    return f"slime train <the recipe and overrides of this run> {shlex.join(options)}"


def _write(base: Path, batch: Batch, account: dict[str, Any], samples: Iterable[Sample]) -> Path:
    base.parent.mkdir(exist_ok=True)
    with base.with_suffix(".jsonl").open("w") as text:
        text.write(json.dumps(account) + "\n")
        text.writelines(map(_readable, samples))
    path = base.with_suffix(".npz")
    batch.save(path)
    return path


def _readable(sample: Sample) -> str:
    """A line of JSON: a sample without its experts and its teacher's log-probs, which the columns hold."""
    values = {name: value for name, value in asdict(replace(sample, experts=None, signal=None)).items() if name not in IN_COLUMNS}
    return json.dumps(values, default=str) + "\n"


def read_rollout(folder: Path, step: int) -> tuple[Batch, RolloutSummary]:
    """One step's batch and account. Raises ValueError naming run.replay where the folder has no such step, or one of another form."""
    named = f"step_{step:07d}.npz"
    path = next((f / named for f in (folder, folder / FOLDER) if (f / named).is_file()), None)
    if path is None:
        raise ValueError(
            f"run.replay={folder}: no rollout of step {step} there ({named}); dump it with rollout.dump=true or lower run.steps"
        )
    return read_batch(path, f"run.replay={folder}: the rollout of step {step}")


def read_batch(path: Path, called: str) -> tuple[Batch, RolloutSummary]:
    """The batch of an .npz file, and the account in the .jsonl beside it. Raises ValueError, which begins with what it is `called`."""
    try:
        with path.with_suffix(".jsonl").open() as text:
            account = json.loads(text.readline())
        account.pop("reason", None)
        return Batch.load(path), RolloutSummary.from_dict(account)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{called} is broken or another slime's ({error}); dump it again") from error
