"""Where the loop's batches come from, as the driver sees it.

    pending = source.start(step, first_ordinal)     # returns at once
    result = pending.result()                       # waits; nothing of it is in flight afterwards

Three sources: `Rollout` (engines), `Demonstrations` (supervised examples), `Replay` (rollouts dumped earlier).
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.cluster import deadline
from slime.config import SlimeConfig
from slime.engine.endpoint import Endpoint
from slime.models.map import Routing
from slime.observe.trace import Span
from slime.types import EvalResult, RolloutSummary, WeightVersion

log = logging.getLogger(__name__)

STEP_KNOB = "cluster.step_timeout_s"
PROGRESS_S = 0.1
MANAGER_S = 60.0  # for small questions; the manager answers between two pieces of work, the longest of which is packing a batch


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """A finished batch: a reference for the ranks, the account for the driver, and where the time went."""

    ref: "ray.ObjectRef"  # of a types.Batch
    summary: RolloutSummary
    spans: list[Span] = field(default_factory=list)


class Pending(Protocol):
    """A batch under way."""

    step: int

    def wait(self, timeout_s: float) -> bool:
        """Whether it is finished, after at most `timeout_s`."""
        ...

    def progress(self) -> int:
        """Prompts finished so far."""
        ...

    def result(self) -> RolloutResult:
        """The batch; waits for it. Raises what the rollout raised."""
        ...


class BatchSource(Protocol):
    """Makes the batch of a step from the prompts that `first_ordinal` begins."""

    def expect(self, version: WeightVersion) -> None:
        """From here on every answer must come from these weights."""
        ...

    def add(self, endpoint: Endpoint) -> None:
        """One more engine, where engines answer; it is used from the next `expect` on."""
        ...

    def start(self, step: int, first_ordinal: int) -> Pending: ...

    def evaluate(self, step: int) -> tuple[list[EvalResult], list[Span]]:
        """Every evaluation set with the weights that are expected, and where the time went."""
        ...

    def stop(self) -> None: ...


@dataclass(slots=True)
class Ready:
    """A batch that is there already."""

    step: int
    _result: RolloutResult

    def wait(self, timeout_s: float) -> bool:
        return True

    def progress(self) -> int:
        return len(self._result.summary.trained)

    def result(self) -> RolloutResult:
        return self._result


@dataclass
class Generating:
    """A batch that the RolloutManager works on."""

    step: int
    _ref: "ray.ObjectRef"
    _manager: Any
    _give_up_s: float  # time.monotonic()
    _timeout_s: float
    _asked: "ray.ObjectRef | None" = None  # for progress, not answered yet
    _heard: tuple[int, int] = (0, 0)  # prompts finished, and of how many

    def wait(self, timeout_s: float) -> bool:
        """Raises TimeoutError naming cluster.step_timeout_s when the whole rollout has taken longer."""
        if ray.wait([self._ref], timeout=timeout_s)[0]:
            return True
        if time.monotonic() > self._give_up_s:
            done, of = self._heard
            raise TimeoutError(f"rollout {self.step + 1}: {done} of {of} prompts finished after {self._timeout_s:g} s ({STEP_KNOB})")
        return False

    def progress(self) -> int:
        """As last heard: while a function of the user's holds up the manager, it answers late."""
        self._asked = self._asked or self._manager.progress.remote()
        if ray.wait([self._asked], timeout=PROGRESS_S)[0]:
            self._heard = deadline.get(self._asked, MANAGER_S, "the rollout's progress")
            self._asked = None
        return self._heard[0]

    def result(self) -> RolloutResult:
        left_s = max(0.1, self._give_up_s - time.monotonic())
        ref, summary, spans = deadline.get(self._ref, left_s, f"rollout {self.step + 1}", STEP_KNOB)
        return RolloutResult(ref, summary, spans)


class Rollout:
    """Batches from the engines, through the RolloutManager.

    rollout = Rollout.launch(cfg, run_dir)          # at once; the manager opens data, tokenizer and rewards while engines start
    rollout.connect(fleet.endpoints(), vocab_size)
    """

    def __init__(self, cfg: SlimeConfig, manager: Any) -> None:
        self._cfg, self._manager = cfg, manager
        self._opened = manager.open.remote()

    @classmethod
    def launch(cls, cfg: SlimeConfig, run_dir: Path) -> "Rollout":
        """Begin to start the RolloutManager on the driver's host."""
        from slime.rollout.manager import RolloutManager

        if cfg.rollout.select == "arrival":
            log.warning("rollout.select=arrival: the groups that finish first make the batch, which leans to short answers")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(RolloutManager).options(num_cpus=0, scheduling_strategy=here, max_concurrency=8)
        return cls(cfg, actor.remote(cfg, str(run_dir)))

    def connect(self, endpoints: list[Endpoint], vocab_size: int, routing: Routing | None = None) -> None:
        """Wait for the manager and give it the engines. Raises ValueError naming the knob of what it cannot use."""
        deadline.get(self._opened, self._cfg.cluster.start_timeout_s, "the rollout manager to start", "cluster.start_timeout_s")
        deadline.get(self._manager.connect.remote(endpoints, vocab_size, routing), MANAGER_S, "the rollout manager to take the engines")

    def add(self, endpoint: Endpoint) -> None:
        """One more engine; it is used from the next `expect` on."""
        deadline.get(self._manager.add.remote(endpoint), MANAGER_S, "the rollout manager to take an engine")

    def expect(self, version: WeightVersion) -> None:
        """From here on every answer must come from these weights. Raises StaleWeights naming an engine that holds others."""
        deadline.get(self._manager.expect.remote(version.label), MANAGER_S, "the rollout manager to take the weight version")

    def start(self, step: int, first_ordinal: int) -> Pending:
        timeout_s = self._cfg.cluster.step_timeout_s
        ref = self._manager.generate.remote(step, first_ordinal)
        return Generating(step, ref, self._manager, time.monotonic() + timeout_s, timeout_s)

    def evaluate(self, step: int) -> tuple[list[EvalResult], list[Span]]:
        return deadline.get(self._manager.evaluate.remote(step), self._cfg.cluster.step_timeout_s, f"evaluation at step {step}", STEP_KNOB)

    def stop(self) -> None:
        """End the manager and its reward workers."""
        ray.kill(self._manager)
