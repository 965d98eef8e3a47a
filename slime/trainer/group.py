"""The trainer as the driver sees it: a plain object over the ranks."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB, ClusterLost, ProcessLost
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.exits import GateStopped, GraceOver, SavedRunAgain
from slime.observe.trace import Span
from slime.sync.diff import Delta
from slime.sync.records import ModelSpec
from slime.trainer.rank import THREADS, Rank
from slime.trainer.saving import Saving, lost_rank, settle
from slime.trainer.where import where
from slime.types import Batch, WeightVersion

log = logging.getLogger(__name__)

START_KNOB = "cluster.start_timeout_s"


class TrainerGroup:
    """All ranks of the actor. Methods return when every rank is done.

    They raise what a rank raised, TimeoutError when cluster.step_timeout_s has passed, ProcessLost naming a rank whose process died. A
    failure that leaves ranks waiting for one another ends them all, and where each of them waited is told.
    """

    def __init__(self, cfg: SlimeConfig, ranks: list[Any]) -> None:
        """Takes over Ray handles of `Rank`; see `start`."""
        self.cfg = cfg
        self._ranks = ranks  # the first is the leader
        self._saving: Saving | None = None  # the last one

    @classmethod
    def start(cls, cfg: SlimeConfig, placement: RolePlacement) -> "TrainerGroup":
        """Start one rank on every device of the placement, let them meet and build the model.

        Raises ValueError for a model, algorithm or option that cannot be used, TimeoutError after cluster.start_timeout_s.
        """
        threads = max(1, int(placement.cpus))
        env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if placement.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        world = len(placement.bundles)
        actor = ray.remote(concurrency_groups=THREADS)(Rank)  # type: ignore[call-overload]
        ranks = [
            actor.options(
                num_cpus=placement.cpus,
                num_gpus=1 if placement.device == "cuda" else 0,
                scheduling_strategy=placement.strategy(rank),
                runtime_env={"env_vars": env},
            ).remote(cfg, rank, world, placement.device, threads)
            for rank in range(world)
        ]
        group = cls(cfg, ranks)
        try:
            group._build()
        except BaseException:
            group.stop()
            raise
        return group

    def _build(self) -> None:
        timeout_s = self.cfg.cluster.start_timeout_s
        address, port = deadline.get(self._ranks[0].open_store.remote(), timeout_s, "trainer rank 0 to start", START_KNOB)
        self._together(
            [rank.build.remote(address, port) for rank in self._ranks], "the trainer ranks to build the model", timeout_s, START_KNOB
        )

    def update(self, batch: "ray.ObjectRef | Batch", meanwhile: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train one batch: one or more optimizer steps. Returns train/*, mismatch/*, offpolicy/*, staleness/*, advantage/*, perf/*,
        time/train_s; see `step.train_batch`. `meanwhile` is called about once a second.

        Raises RuntimeError for a gradient that is not finite; that step was not taken and the ranks stay usable.
        """
        ref = _as_ref(batch)
        return self._together([rank.train.remote(ref) for rank in self._ranks], "the trainer to update", meanwhile=meanwhile)[0]

    def logprobs(self, batch: "ray.ObjectRef | Batch") -> np.ndarray:
        """Log-probs of a batch's trained tokens under the current weights, float32 [T], 0 outside loss_mask."""
        ref = _as_ref(batch)
        return self._together([rank.log_probs.remote(ref) for rank in self._ranks], "the trainer's log-probs")[0]

    def weights(self, version: WeightVersion, bucket_bytes: int) -> "Iterator[ray.ObjectRef]":
        """The current weights, labelled `version` in errors: references to buckets list[(HF name, torch.Tensor)] of at most about
        `bucket_bytes`, in a fixed order. A bucket is gathered when it is asked for and lives as long as its reference."""
        timeout_s, what = self.cfg.cluster.step_timeout_s, f"the trainer to gather weights {version.label}"
        plan = deadline.get(self._ranks[0].plan_buckets.remote(bucket_bytes), timeout_s, what, STEP_KNOB)
        for names in plan:
            yield self._together([rank.gather_bucket.remote(names) for rank in self._ranks], what)[0]

    def spec(self) -> ModelSpec:
        """The tensors that `delta` speaks of: equal for every layout."""
        return deadline.get(self._ranks[0].weights_spec.remote(), self.cfg.cluster.step_timeout_s, "the trainer's tensors", STEP_KNOB)

    def take_base(self, run_id: str) -> list[int]:
        """Keep the weights as snapshot, where sync.snapshot says; returns the tensors' fingerprints. To be called while they are the model
        directory's, before any checkpoint is loaded."""
        refs = [rank.take_base.remote(run_id, self.cfg.sync.snapshot == "host") for rank in self._ranks]
        return self._together(refs, "the trainer to keep its weights")[0]

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        """What differs between the weights, labelled `version` in errors, and the snapshot, in parts of about `part_bytes` of weights. The
        parts' bytes stay in the object store of the ranks' hosts."""
        refs = [rank.encode.remote(codec, part_bytes) for rank in self._ranks]
        answers = self._together(refs, f"the trainer to encode weights {version.label}")
        parts = sorted((part for encoded, _ in answers for part in encoded), key=lambda part: part[0])
        assert [number for number, _, _ in parts] == list(range(len(parts))), "every part is encoded by one rank"
        return Delta([data for _, _, data in parts], tuple(ref for _, ref, _ in parts), answers[0][1])

    def acknowledge(self, version: WeightVersion) -> None:
        """What `delta` gave last is held by every engine: it becomes the snapshot. The weights must not have been trained on since."""
        self._together([rank.acknowledge.remote() for rank in self._ranks], f"the trainer to keep weights {version.label}")

    def save(self, directory: Path) -> Saving:
        """Begin to write the ranks' shards into `directory`, which every rank must see. Returns when every rank holds its share in host
        memory; the weights may be trained on while threads of the ranks write it. A save must have ended before the next one begins."""
        assert self._saving is None or self._saving.done(), "one save at a time"
        what = f"the trainer to hold what it saves to {directory}"
        sizes = self._together([rank.hold.remote(str(directory)) for rank in self._ranks], what)
        self._saving = Saving(directory, max(sizes), [rank.write.remote() for rank in self._ranks])
        return self._saving

    def load(self, directory: Path) -> None:
        """Continue from shards that `save` wrote. Raises ValueError where there are none."""
        self._together([rank.load.remote(str(directory)) for rank in self._ranks], f"the trainer to load {directory}")

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory that transformers and SGLang load."""
        self._together([rank.export_hf.remote(str(directory)) for rank in self._ranks], f"the trainer to export {directory}")

    def spans(self) -> list[Span]:
        """What the ranks did since the last call."""
        return [span for spans in self._together([rank.spans.remote() for rank in self._ranks], "the ranks' spans") for span in spans]

    def stop(self) -> None:
        """End every rank at once. May be called again."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _together(
        self,
        refs: "list[ray.ObjectRef]",
        what: str,
        timeout_s: float | None = None,
        knob: str = STEP_KNOB,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Results of a call on several ranks. After a failure, ranks that go on waiting for one another are ended; where they were
        stands in a file of the run's logs."""
        beside: list[Exception] = []

        def look() -> None:
            try:
                meanwhile()
            except Exception as error:
                beside.append(error)
                raise

        try:
            return deadline.get(refs, timeout_s or self.cfg.cluster.step_timeout_s, what, knob, look)
        except (SavedRunAgain, GraceOver, ClusterLost):
            raise  # of the run, which is about to end; the ranks do as they were asked
        except Exception as error:
            if error in beside:
                raise
            self._after(error, refs, what)
            raise

    def _after(self, error: Exception, refs: "list[ray.ObjectRef]", what: str) -> None:
        """A call has failed on a rank. Raises what says more than `error`."""
        seen = self._where(what) if isinstance(error, TimeoutError) else ""
        waiting, dead = settle(refs)
        if waiting or dead:
            seen = seen or self._where(what)
            log.error("%d of %d trainer ranks do not answer; ending them all. %s", len(waiting) + len(dead), len(refs), seen)
            self.stop()
        if dead and not isinstance(error, ProcessLost):
            raise lost_rank(what, dead[0]) from error
        if waiting and isinstance(error, RuntimeError) and not isinstance(error, ProcessLost | GateStopped):  # a collective broke
            raise ProcessLost(f"waiting for {what}: {error}; trainer rank {waiting[0]} does not answer. {seen}") from error
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{error}: {seen}") from error

    def _where(self, what: str) -> str:
        return where(self._ranks, what, Path(self.cfg.run.dir).resolve() / str(self.cfg.run.name) / "logs")


def _as_ref(batch: "ray.ObjectRef | Batch") -> "ray.ObjectRef":
    return ray.put(batch) if isinstance(batch, Batch) else batch
