"""run.only=train: batches that an earlier run dumped, in place of engines."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import ray

from slime.engine.endpoint import Endpoint
from slime.engine.health import Turn
from slime.rollout.dump import read_batch, read_rollout
from slime.rollout.handle import Evaluated, Pending, Ready, RolloutResult
from slime.types import Batch, RolloutSummary, WeightVersion


@dataclass
class Replay:
    """The dumped batches of a folder, each in its step; or the batch of one file, in whichever step the run is."""

    path: Path
    _replayed: int | None = field(default=None, init=False)  # the step that the file's batch was given to

    @property
    def is_file(self) -> bool:
        return not self.path.is_dir()

    def start(self, step: int, first_ordinal: int) -> Pending[RolloutResult]:
        """Raises ValueError naming run.replay for a step that was not dumped, and for a second one of a file."""
        batch, summary = self._only(step) if self.is_file else read_rollout(self.path, step)
        shift = first_ordinal - summary.first_ordinal
        summary = replace(
            summary,
            step=step,
            first_ordinal=first_ordinal,
            trained=[o + shift for o in summary.trained],
            dropped={o + shift: reason for o, reason in summary.dropped.items()},
        )
        return Ready(step, RolloutResult(ray.put(batch), summary))

    def _only(self, step: int) -> tuple[Batch, RolloutSummary]:
        if self._replayed not in (None, step):
            raise ValueError(
                f"run.replay={self.path} is one batch, which is update {self._replayed + 1}; set run.steps={self._replayed + 1}"
            )
        self._replayed = step
        return read_batch(self.path, f"run.replay={self.path}")

    def add(self, endpoint: Endpoint) -> None:
        raise AssertionError("no engine answers")

    def expect(self, version: WeightVersion) -> None:
        """No engines answer here."""

    def engines(self, turns: Sequence[Turn]) -> None:
        """No engines answer here."""

    def evaluate(self, step: int) -> Pending[Evaluated]:
        return Ready(step, ([], []))

    def probe(self, step: int, batch: "ray.ObjectRef", logprobs: np.ndarray) -> Pending[dict[str, float]]:
        raise AssertionError("no engine answers")

    def stop(self) -> None:
        pass
