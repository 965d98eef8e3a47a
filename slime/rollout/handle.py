"""Where the loop's batches come from, as the driver sees it.

    pending = source.start(step, first_ordinal)     # returns at once
    while not pending.wait(0.2):                    # engines that fail meanwhile are looked after:
        pending.progress()
        trainer.read_ahead(pending.finished())
        fleet.report(pending.troubles())
        source.engines(fleet.tend())
    result = pending.result()                       # nothing of it is in flight afterwards

Three sources: `Rollout` (engines), `Demonstrations` (supervised examples), `Replay` (rollouts dumped earlier).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB
from slime.config import SlimeConfig
from slime.engine.endpoint import Endpoint
from slime.engine.health import Trouble, Turn
from slime.models.map import Routing
from slime.observe.trace import Span
from slime.types import EvalResult, RolloutSummary, WeightVersion

log = logging.getLogger(__name__)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PROGRESS_S = 0.1
ANSWER_S = 5.0
MANAGER_S = 60.0  # for small questions; the manager answers between two pieces of work, the longest of which is packing a batch


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """A finished batch: a reference for the ranks, the account for the driver, and where the time went."""

    ref: "ray.ObjectRef"  # of a types.Batch
    summary: RolloutSummary
    spans: list[Span] = field(default_factory=list)


Evaluated = tuple[list[EvalResult], list[Span]]  # every evaluation set, and where the time went


class Pending(Protocol[T_co]):
    """Something under way: a batch, an evaluation."""

    @property
    def step(self) -> int: ...

    def wait(self, timeout_s: float) -> bool:
        """Whether it is finished, after at most `timeout_s`."""
        ...

    def progress(self) -> int:
        """Prompts finished so far."""
        ...

    def troubles(self) -> list[Trouble]:
        """What went wrong with engines, as far as `progress` has heard, since the last call."""
        ...

    def finished(self) -> "list[ray.ObjectRef]":
        """Groups of the batch (a types.Batch each) that the ranks' teachers may read already, as far as `progress` has heard, since the
        last call. All of them are in the batch."""
        ...

    def result(self) -> T_co:
        """What it came to; waits for it. Raises what it raised."""
        ...


class BatchSource(Protocol):
    """Makes the batch of a step from the prompts that `first_ordinal` begins."""

    def expect(self, version: WeightVersion) -> None:
        """From here on every answer must come from these weights."""
        ...

    def add(self, endpoint: Endpoint) -> None:
        """One more engine, where engines answer; it is used from the next `expect` on."""
        ...

    def engines(self, turns: Sequence[Turn]) -> None:
        """What became of engines, as EngineFleet.tend says."""
        ...

    def start(self, step: int, first_ordinal: int) -> Pending[RolloutResult]: ...

    def evaluate(self, step: int) -> Pending[Evaluated]:
        """Every evaluation set with the weights that are expected."""
        ...

    def probe(self, step: int, batch: "ray.ObjectRef", logprobs: np.ndarray) -> Pending[dict[str, float]]:
        """mismatch/* between the engines and the trainer, whose log-probs of the batch's first tokens these are, see
        `RolloutManager.probe`. Both must hold the expected weights; those that drew the batch may have been others."""
        ...

    def stop(self) -> None: ...


@dataclass(slots=True)
class Ready(Generic[T]):
    """What is there already."""

    step: int
    _result: T

    def wait(self, timeout_s: float) -> bool:
        return True

    def progress(self) -> int:
        return 0

    def troubles(self) -> list[Trouble]:
        return []

    def finished(self) -> "list[ray.ObjectRef]":
        return []

    def result(self) -> T:
        return self._result


@dataclass
class Working(Generic[T]):
    """What the RolloutManager works on."""

    step: int
    _what: str
    _kind: str  # rollout, evaluation or probe
    _ref: "ray.ObjectRef"
    _made: Callable[[Any], T]  # of what the manager returns
    _manager: Any
    _give_up_s: float  # time.monotonic()
    _timeout_s: float
    _asked: "ray.ObjectRef | None" = None  # for progress, not answered yet
    _heard: tuple[int, int] = (0, 0)  # prompts finished, and of how many
    _troubles: list[Trouble] = field(default_factory=list)
    _finished: "list[ray.ObjectRef]" = field(default_factory=list)

    def wait(self, timeout_s: float) -> bool:
        """Raises TimeoutError naming cluster.step_timeout_s when all of it has taken longer."""
        if ray.wait([self._ref], timeout=timeout_s)[0]:
            return True
        if time.monotonic() > self._give_up_s:
            done, of = self._heard
            said = f"{self._what}: {done} of {of} prompts finished after {self._timeout_s:g} s ({STEP_KNOB})"
            raise TimeoutError(f"{said}: {self._where()}")
        return False

    def _where(self) -> str:
        """What the manager waits for, if it still answers."""
        asked = self._manager.waits.remote()
        if not ray.wait([asked], timeout=ANSWER_S)[0]:
            return "the rollout manager does not answer: a function of the recipe (rollout.generate, rollout.filter) blocks it"
        return deadline.get(asked, ANSWER_S, "the rollout manager to say what it waits for")

    def progress(self) -> int:
        """As last heard: while a function of the user's holds up the manager, it answers late."""
        self._asked = self._asked or self._manager.progress.remote(self._kind)
        if ray.wait([self._asked], timeout=PROGRESS_S)[0]:
            heard = deadline.get(self._asked, MANAGER_S, "the rollout's progress")
            self._heard, self._asked = (heard.done, heard.of), None
            self._troubles += heard.troubles
            self._finished += heard.finished
        return self._heard[0]

    def troubles(self) -> list[Trouble]:
        drained, self._troubles = self._troubles, []
        return drained

    def finished(self) -> "list[ray.ObjectRef]":
        drained, self._finished = self._finished, []
        return drained

    def result(self) -> T:
        left_s = max(0.1, self._give_up_s - time.monotonic())
        return self._made(deadline.get(self._ref, left_s, self._what, STEP_KNOB))


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

    def connect(
        self,
        endpoints: list[Endpoint],
        vocab_size: int,
        routing: Routing | None = None,
        teachers: dict[str, list[Endpoint]] | None = None,
    ) -> None:
        """Wait for the manager and give it the engines, and the servers of teachers by name. Raises ValueError naming the knob of what it
        cannot use, PreflightError for a teacher that does not answer."""
        deadline.get(self._opened, self._cfg.cluster.start_timeout_s, "the rollout manager to start", "cluster.start_timeout_s")
        given = (endpoints, vocab_size, routing, teachers)
        deadline.get(self._manager.connect.remote(*given), MANAGER_S, "the rollout manager to take the engines")
        if teachers:
            self._check_teachers()

    def _check_teachers(self) -> None:
        timeout_s, what = self._cfg.rollout.request_timeout_s + MANAGER_S, "the teachers to say how they read tokens"
        deadline.get(self._manager.check_teachers.remote(), timeout_s, what, "rollout.request_timeout_s")

    def add(self, endpoint: Endpoint) -> None:
        """One more engine; it is used from the next `expect` on."""
        deadline.get(self._manager.add.remote(endpoint), MANAGER_S, "the rollout manager to take an engine")

    def expect(self, version: WeightVersion) -> None:
        """From here on every answer must come from these weights. Raises StaleWeights where engines answer and none holds them."""
        deadline.get(self._manager.expect.remote(version.label), MANAGER_S, "the rollout manager to take the weight version")

    def engines(self, turns: Sequence[Turn]) -> None:
        """What became of engines: those that are out get nothing, those that are back get requests once they hold the expected weights."""
        if turns:
            deadline.get(self._manager.tell.remote(list(turns)), MANAGER_S, "the rollout manager to hear of engines")

    def start(self, step: int, first_ordinal: int) -> Pending[RolloutResult]:
        return self._working(step, f"rollout {step + 1}", "rollout", self._manager.generate.remote(step, first_ordinal), _rollout_of)

    def evaluate(self, step: int) -> Pending[Evaluated]:
        return self._working(step, f"evaluation at step {step}", "evaluation", self._manager.evaluate.remote(step), _evaluation_of)

    def probe(self, step: int, batch: "ray.ObjectRef", logprobs: np.ndarray) -> Pending[dict[str, float]]:
        return self._working(step, f"the probe of update {step + 1}", "probe", self._manager.probe.remote(batch, logprobs), dict)

    def _working(self, step: int, what: str, kind: str, ref: "ray.ObjectRef", made: Callable[[Any], T]) -> Working[T]:
        timeout_s = self._cfg.cluster.step_timeout_s
        return Working(step, what, kind, ref, made, self._manager, time.monotonic() + timeout_s, timeout_s)

    def stop(self) -> None:
        """End the manager and its reward workers."""
        ray.kill(self._manager)


def _rollout_of(returned: tuple[Any, RolloutSummary, list[Span]]) -> RolloutResult:
    return RolloutResult(*returned)


def _evaluation_of(returned: Evaluated) -> Evaluated:
    return returned
