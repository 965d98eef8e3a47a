"""What a rank holds between two batches."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from slime.algorithms.base import Algorithm
from slime.config import SlimeConfig
from slime.observe.trace import Tracer
from slime.trainer.device import Device
from slime.trainer.distributed import Parallel
from slime.trainer.export import Atlas
from slime.trainer.frozen import Frozen
from slime.trainer.model import Model
from slime.trainer.packing import MicroBatch, pack, padded_lengths, partition, partition_apart
from slime.trainer.said import Heard
from slime.types import NOT_RECORDED, Batch


@dataclass(kw_only=True)
class Trained:
    """One rank's share of a model that learns: the policy, or its critic."""

    UPDATE: ClassVar[str] = "update"  # how errors name what it does with a batch
    RATE: ClassVar[str] = "trainer.lr"  # the knob of its learning rate
    BESIDE: ClassVar[str] = ""  # what has happened before it
    READS: ClassVar[str] = "log-probs or advantages"  # what its loss is made of

    cfg: SlimeConfig  # the recipe; of a critic as `slime.config.of_critic` reads it
    device: Device
    parallel: Parallel
    model: Model
    tracer: Tracer
    reference: Frozen | None = None  # of the KL, where the algorithm has one; a critic has none
    reference_moved: bool = False  # it is not the model that the run began from any more
    optimizer_steps: int = 0  # completed
    version: int = 0  # of the weights: completed batches

    @property
    def steps_per_batch(self) -> int:
        return self.cfg.trainer.updates_per_batch * self.cfg.trainer.epochs_per_batch

    def micro_batches(self, batch: Batch, apart: np.ndarray | None = None) -> list[MicroBatch]:
        """This rank's share of a batch, packed; samples of different numbers in `apart` (int64 [N]) share nothing, see `partition_apart`.
        Raises ValueError for recorded experts that are not the model's."""
        self._check_experts(batch)
        dp, cp, tp = self.parallel.dp, self.parallel.cp, self.parallel.tp
        quadratic_at = 12 * self.model.config.hidden_size  # tokens at which attention costs a layer as much as its projections
        budget = self.cfg.trainer.max_tokens_per_rank * cp.size()
        interleaved = self.parallel.sizes.virtual > 1  # such stages take micro-batches in rounds, and rows of one length
        multiple = self.parallel.pp.size() if interleaved else 1
        lengths = padded_lengths(batch.lengths, cp.size())
        if apart is None:
            plan = partition(lengths, dp.size(), budget, quadratic_at, multiple)[dp.rank()]
        else:
            assert not interleaved, "rows of one length would depend on one another"
            plan = partition_apart(lengths, apart, dp.size(), budget, quadratic_at, anywhere=self.parallel.ep.size() == 1)[dp.rank()]
        rows = [pack(batch, samples, tp.size(), cp.rank(), cp.size()) for samples in plan]
        if not interleaved:
            return rows
        longest = max(len(row.tokens) for row in rows)
        return [pack(batch, samples, tp.size(), cp.rank(), cp.size(), longest) for samples in plan]

    def _check_experts(self, batch: Batch) -> None:
        if batch.experts is None:
            return
        config = self.model.config
        shape, most = (config.num_layers, config.moe_router_topk), config.num_moe_experts or 0
        if batch.experts.shape[1:] != shape or not NOT_RECORDED <= batch.experts.min() <= batch.experts.max() < most:
            raise ValueError(
                f"the batch names experts up to {batch.experts.max()} of {batch.experts.shape[1:]} layers and choices, the model has "
                f"{shape} of {most}: replay rollouts of the same model, or set rollout.replay_experts=false"
            )


@dataclass(kw_only=True)
class Trainer(Trained):
    """The policy, and what its algorithm reads beside it."""

    atlas: Atlas
    algorithm: Algorithm
    teachers: dict[int, Frozen] = field(default_factory=dict)  # those that are held here, by their position in algorithm.teachers
    heard: dict[int, Heard] = field(default_factory=dict)  # what those have said since the last update, by group ordinal

    @property
    def temperature(self) -> float:
        """What logits are divided by: what the engines sample at; 1 where no engine samples."""
        return self.cfg.rollout.temperature if self.algorithm.needs_rollouts else 1.0
