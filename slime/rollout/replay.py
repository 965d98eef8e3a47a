"""run.only=train: batches that an earlier run dumped, in place of engines."""

from dataclasses import dataclass, replace
from pathlib import Path

import ray

from slime.engine.endpoint import Endpoint
from slime.observe.trace import Span
from slime.rollout.dump import read_rollout
from slime.rollout.handle import Pending, Ready, RolloutResult
from slime.types import EvalResult, WeightVersion


@dataclass
class Replay:
    """The dumped batches of a folder."""

    folder: Path

    def start(self, step: int, first_ordinal: int) -> Pending:
        batch, summary = read_rollout(self.folder, step)
        shift = first_ordinal - summary.first_ordinal
        summary = replace(
            summary,
            first_ordinal=first_ordinal,
            trained=[o + shift for o in summary.trained],
            dropped={o + shift: reason for o, reason in summary.dropped.items()},
        )
        return Ready(step, RolloutResult(ray.put(batch), summary))

    def add(self, endpoint: Endpoint) -> None:
        raise AssertionError("no engine answers")

    def expect(self, version: WeightVersion) -> None:
        """No engines answer here."""

    def evaluate(self, step: int) -> tuple[list[EvalResult], list[Span]]:
        return [], []

    def stop(self) -> None:
        pass
