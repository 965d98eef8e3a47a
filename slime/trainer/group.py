"""The trainer as the driver sees it: a plain object over the ranks, and the critic beside it."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from slime.cluster import deadline
from slime.cluster.deadline import STEP_KNOB
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.config.roles import uses_critic
from slime.observe.trace import Span
from slime.sync.diff import Delta
from slime.sync.records import ModelSpec
from slime.trainer.rank import ACTOR, CRITIC, TRAINER
from slime.trainer.ranks import Ranks, launch
from slime.trainer.saving import Saving, settled
from slime.types import Batch, WeightVersion

log = logging.getLogger(__name__)


class CriticGroup(Ranks):
    """The ranks that hold the critic: of their own, or the actor's."""

    NAME = "critic"

    def __init__(self, cfg: SlimeConfig, ranks: list[Any], own: bool) -> None:
        super().__init__(cfg, ranks)
        self.own = own
        self.learned = 0  # batches that it has learned from
        self.seconds = 0.0  # that the last `values` or `learn` took

    def values(self, batch: "ray.ObjectRef", meanwhile: Callable[[], None]) -> "ray.ObjectRef":
        """What `learn` and the actor's `train` are given: float32 [T], on the leader's host."""
        begun = time.perf_counter()
        found = [rank.values.options(num_returns=2).remote(batch) for rank in self.ranks]
        self.together([done for done, _ in found], "the critic's values", meanwhile=meanwhile)
        self.seconds = time.perf_counter() - begun
        return found[0][1]

    def learn(
        self, batch: "ray.ObjectRef", values: "ray.ObjectRef", returns: "ray.ObjectRef", meanwhile: Callable[[], None]
    ) -> dict[str, float]:
        """Learn from a batch; returns value/*, critic/* and time/critic_s. Raises NotFinite."""
        begun = time.perf_counter()
        refs = [rank.learn.remote(batch, values, returns) for rank in self.ranks]
        metrics = self.together(refs, "the critic to learn", meanwhile=meanwhile)[0]
        self.learned += 1
        return {**metrics, "time/critic_s": self.seconds + time.perf_counter() - begun}


class TrainerGroup(Ranks):
    """All ranks of the actor. Methods return when every rank is done, and raise as `Ranks` says."""

    NAME = "trainer"

    def __init__(self, cfg: SlimeConfig, ranks: list[Any], critic: CriticGroup | None = None) -> None:
        """Takes over Ray handles; see `start`."""
        super().__init__(cfg, ranks)
        self.critic = critic
        self._saving: Saving | None = None  # the last one
        self._finished: list[ray.ObjectRef] = []  # groups that teachers have not been given yet
        self._reading: list[ray.ObjectRef] = []  # of `Rank.read_ahead`, one a rank

    @classmethod
    def start(cls, cfg: SlimeConfig, placement: RolePlacement, of_critic: RolePlacement | None = None) -> "TrainerGroup":
        """Start one rank on every device of the placement, let them meet and build the model. A critic, where the algorithm uses one, has
        ranks of its own on `of_critic`, by default the actor's.

        Raises ValueError for a model, algorithm or option that cannot be used, TimeoutError after cluster.start_timeout_s.
        """
        judged = uses_critic(cfg.algorithm)
        shared = judged and of_critic is None
        ranks = launch(cfg, placement, (ACTOR, CRITIC) if shared else (ACTOR,))
        critic = None
        if judged:
            critic = CriticGroup(cfg, ranks if of_critic is None else launch(cfg, of_critic, (CRITIC,)), own=not shared)
        group = cls(cfg, ranks, critic)
        try:
            building = [(of_role, of_role.begin_build()) for of_role in group._all()]
            for of_role, refs in building:
                of_role.built(refs)
        except BaseException:
            group.stop()
            raise
        return group

    def _all(self) -> list[Ranks]:
        """The actor's ranks, and a critic's own."""
        return [self, self.critic] if self.critic is not None and self.critic.own else [self]

    def read_ahead(self, groups: "list[ray.ObjectRef]") -> None:
        """Let teachers that the ranks hold read these groups of the batch that is being generated (a Batch each). Returns at once; to be
        called often, also with none: one call is under way at a time, and takes all that has come since the last. What it raises is raised
        by the next call here or of `update`."""
        self._finished += groups
        if self._reading and not settled(self._reading):
            return
        self._have_read()
        if self._finished:
            self._reading = [rank.read_ahead.remote(*self._finished) for rank in self.ranks]
            self._finished = []

    def _have_read(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for what teachers read."""
        reading, self._reading = self._reading, []
        if reading:
            self.together(reading, "the trainer's teachers to read finished groups", meanwhile=meanwhile)

    def update(self, batch: "ray.ObjectRef | Batch", meanwhile: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Train one batch: one or more optimizer steps, then the critic's. Returns train/*, mismatch/*, offpolicy/*, staleness/*,
        advantage/*, perf/*, time/train_s, see `step.train_beside`; with a critic value/*, critic/* and time/critic_s. `meanwhile` is called
        about once a second.

        Raises NotFinite for a loss or gradient that is not finite; that step was not taken and the ranks stay usable.
        """
        self._finished = []  # the ranks read those now
        self._have_read(meanwhile)
        ref, critic = _as_ref(batch), self.critic
        values = None if critic is None else critic.values(ref, meanwhile)
        learns = critic is None or critic.learned >= self.cfg.critic.warmup_steps
        found = [rank.train.options(num_returns=2).remote(ref, values, learns) for rank in self.ranks]
        metrics = self.together([done for done, _ in found], "the trainer to update", meanwhile=meanwhile)[0]
        if critic is None or values is None:
            return metrics
        return {**metrics, **critic.learn(ref, values, found[0][1], meanwhile)}

    def logprobs(self, batch: "ray.ObjectRef | Batch") -> np.ndarray:
        """Log-probs of a batch's trained tokens under the current weights, float32 [T], 0 outside loss_mask."""
        ref = _as_ref(batch)
        return self.together([rank.log_probs.remote(ref) for rank in self.ranks], "the trainer's log-probs")[0]

    def probe_logprobs(self, batch: "ray.ObjectRef", meanwhile: Callable[[], None]) -> np.ndarray:
        """What `BatchSource.probe` compares with the engines. See `Rank.probe_logprobs`."""
        refs = [rank.probe_logprobs.remote(batch) for rank in self.ranks]
        return self.together(refs, "the trainer's log-probs of a probe", meanwhile=meanwhile)[0]

    def weights(self, version: WeightVersion, bucket_bytes: int) -> "Iterator[ray.ObjectRef]":
        """The current weights, labelled `version` in errors: references to buckets list[(HF name, torch.Tensor)] of at most about
        `bucket_bytes`, in a fixed order. A bucket is gathered when it is asked for and lives as long as its reference."""
        timeout_s, what = self.cfg.cluster.step_timeout_s, f"the trainer to gather weights {version.label}"
        plan = deadline.get(self.ranks[0].plan_buckets.remote(bucket_bytes), timeout_s, what, STEP_KNOB)
        for names in plan:
            yield self.together([rank.gather_bucket.remote(names) for rank in self.ranks], what)[0]

    def spec(self) -> ModelSpec:
        """The tensors that `delta` speaks of: equal for every layout."""
        return deadline.get(self.ranks[0].weights_spec.remote(), self.cfg.cluster.step_timeout_s, "the trainer's tensors", STEP_KNOB)

    def take_base(self, run_id: str) -> list[int]:
        """Keep the weights as snapshot, where sync.snapshot says; returns the tensors' fingerprints. To be called while they are the model
        directory's, before any checkpoint is loaded."""
        refs = [rank.take_base.remote(run_id, self.cfg.sync.snapshot == "host") for rank in self.ranks]
        return self.together(refs, "the trainer to keep its weights")[0]

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        """What differs between the weights, labelled `version` in errors, and the snapshot, in parts of about `part_bytes` of weights. The
        parts' bytes stay in the object store of the ranks' hosts."""
        refs = [rank.encode.remote(codec, part_bytes) for rank in self.ranks]
        answers = self.together(refs, f"the trainer to encode weights {version.label}")
        parts = sorted((part for encoded, _ in answers for part in encoded), key=lambda part: part[0])
        assert [number for number, _, _ in parts] == list(range(len(parts))), "every part is encoded by one rank"
        return Delta([data for _, _, data in parts], tuple(ref for _, ref, _ in parts), answers[0][1])

    def acknowledge(self, version: WeightVersion) -> None:
        """What `delta` gave last is held by every engine: it becomes the snapshot. The weights must not have been trained on since."""
        self.together([rank.acknowledge.remote() for rank in self.ranks], f"the trainer to keep weights {version.label}")

    def leave(self) -> None:
        """The actor's ranks give up the memory of their devices: nothing but `enter`, `spec`, `spans` and `stop` may be called then."""
        self.together([rank.leave.remote() for rank in self.ranks], "the trainer to give up its memory")

    def enter(self) -> None:
        """They take it back; every bit is as it was."""
        self.together([rank.enter.remote() for rank in self.ranks], "the trainer to take its memory back")

    def save(self, directory: Path) -> Saving:
        """Begin to write the ranks' shards into `directory`, which every rank must see: trainer/, and critic/ where there is one. Returns
        when every rank holds its share in host memory; the weights may be trained on while threads of the ranks write it. A save must have
        ended before the next one begins."""
        assert self._saving is None or self._saving.done(), "one save at a time"
        what = f"the trainer to hold what it saves to {directory}"
        sizes = [size for group in self._all() for size in group.together([rank.hold.remote(str(directory)) for rank in group.ranks], what)]
        refs = [rank.write.remote() for group in self._all() for rank in group.ranks]
        self._saving = Saving(directory, max(sizes), refs, [name for group in self._all() for name in group.names])
        return self._saving

    def load(self, directory: Path) -> None:
        """Continue from shards that `save` wrote. Where there are none of a critic, of a run that had none, it begins anew, with a warning.
        Raises ValueError where there are none of the trainer."""
        self.together([rank.load.remote(str(directory), TRAINER) for rank in self.ranks], f"the trainer to load {directory}")
        if self.critic is None:
            return
        if not (directory / CRITIC).is_dir():
            log.warning("%s holds no critic: it begins anew, from its model, and critic.warmup_steps with it", directory)
            return
        refs = [rank.load.remote(str(directory), CRITIC) for rank in self.critic.ranks]
        self.critic.learned = self.critic.together(refs, f"the critic to load {directory}")[0]

    def export_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory that transformers and SGLang load."""
        self.together([rank.export_hf.remote(str(directory)) for rank in self.ranks], f"the trainer to export {directory}")

    def spans(self) -> list[Span]:
        """What the ranks did since the last call."""
        groups = [group.together([rank.spans.remote() for rank in group.ranks], "the ranks' spans") for group in self._all()]
        return [span for group in groups for spans in group for span in spans]

    def stop(self) -> None:
        """End every rank at once. May be called again."""
        if self.critic is not None and self.critic.own:
            self.critic.stop()
        super().stop()


def _as_ref(batch: "ray.ObjectRef | Batch") -> "ray.ObjectRef":
    return ray.put(batch) if isinstance(batch, Batch) else batch
