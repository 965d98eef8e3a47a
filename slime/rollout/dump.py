"""Rollouts on disk: rollout.dump writes them, run.replay reads them.

rollouts/step_0000003.npz holds the columns of the batch, bit for bit; step_0000003.jsonl the account and then one readable sample a line.
"""

import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slime.types import Batch, Group, RolloutSummary, Sample

FOLDER = "rollouts"


def write_rollout(run_dir: Path, batch: Batch, summary: RolloutSummary, groups: list[Group]) -> None:
    """Write one step's batch and samples."""
    base = run_dir / FOLDER / f"step_{summary.step:07d}"
    base.parent.mkdir(exist_ok=True)
    batch.save(base.with_suffix(".npz"))
    with base.with_suffix(".jsonl").open("w") as text:
        text.write(json.dumps(summary.to_dict()) + "\n")
        text.writelines(json.dumps(_readable(s), default=str) + "\n" for g in groups for s in g.samples)


def _readable(sample: Sample) -> dict[str, Any]:
    """A sample without its experts, which the columns hold."""
    return {name: value for name, value in asdict(replace(sample, experts=None)).items() if name != "experts"}


def read_rollout(folder: Path, step: int) -> tuple[Batch, RolloutSummary]:
    """One step's batch and account. Raises ValueError naming run.replay where the folder has no such step, or one of another form."""
    base = next((f / f"step_{step:07d}" for f in (folder, folder / FOLDER) if (f / f"step_{step:07d}.npz").is_file()), None)
    if base is None:
        raise ValueError(
            f"run.replay={folder}: no rollout of step {step} there (step_{step:07d}.npz); dump it with rollout.dump=true or lower run.steps"
        )
    try:
        with base.with_suffix(".jsonl").open() as text:
            return Batch.load(base.with_suffix(".npz")), RolloutSummary.from_dict(json.loads(text.readline()))
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"run.replay={folder}: the rollout of step {step} is broken or another slime's ({error}); dump it again"
        ) from error
