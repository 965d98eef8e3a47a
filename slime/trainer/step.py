"""What a batch does to the weights: losses, gradients, optimizer steps.

The loss of an update is sum_t w_t l_t over its trained tokens, with weights that depend on the whole update alone
(`slime.algorithms.aggregation`). Micro-batches and ranks contribute sums and nothing is divided afterwards, so that a gradient does not
depend on how the update was cut and packed.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.algorithms.aggregation import token_weights
from slime.algorithms.base import LossInputs, Step, Targets
from slime.trainer import metrics, performance, routing
from slime.trainer.optimize import accumulate, take_step, weighted_sums
from slime.trainer.packing import MicroBatch, updates_of
from slime.trainer.passes import log_probs, of_labels, tokens_of
from slime.trainer.said import Said
from slime.trainer.sequences import SequencesOfRanks
from slime.trainer.state import Trainer
from slime.trainer.teaching import ask_teachers, divergence_from
from slime.types import Batch


@dataclass(frozen=True)
class Columns:
    """What is known of a batch's tokens before its first optimizer step. [T] each, but for the scale."""

    advantages: np.ndarray  # float64
    old_logprobs: np.ndarray | None = None  # float32; None: the current ones, detached
    ref_logprobs: np.ndarray | None = None  # float32; None where the algorithm reads none
    said: Said = field(default_factory=Said)  # by teachers, for the loss
    importance_scale: float = 1.0

    def at(self, tokens: np.ndarray) -> "Columns":
        """Of these tokens (bool [T])."""

        def chosen(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[tokens]

        known = chosen(self.old_logprobs), chosen(self.ref_logprobs), self.said.at(tokens)
        return Columns(self.advantages[tokens], *known, self.importance_scale)


def train_batch(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """`train_beside` for an algorithm without a critic."""
    return train_beside(trainer, batch, None, learns=True)[0]


def train_beside(trainer: Trainer, batch: Batch, values: np.ndarray | None, learns: bool) -> tuple[dict[str, float], np.ndarray | None]:
    """Take trainer.updates_per_batch * trainer.epochs_per_batch optimizer steps on a batch; returns its metrics, the same on every rank
    but for times and speeds, and what a critic is to learn from it (float64 [T]).

    `values` (float32 [T]) are the critic's, None without one. While a critic warms up, `learns` is False: no optimizer step is taken, and
    the version counts all the same.

    Metrics that the algorithm reports are means with the loss's own weights. mismatch/* and offpolicy/* compare log-probs from before the
    first optimizer step: of the whole batch with one update or where the algorithm reads old log-probs, else of the first update's samples.
    Raises NotFinite, on every rank alike, for a loss or gradient that is not finite: that optimizer step and those after it are not taken;
    ValueError before the first step for a batch of which one has nothing to train on.
    """
    begun = time.perf_counter()
    cfg, algorithm, version = trainer.cfg.trainer, trainer.algorithm, trainer.version
    batch = batch if trainer.cfg.rollout.replay_experts else replace(batch, experts=None)
    without_replay = _without_replay(trainer, batch)
    several = trainer.steps_per_batch > 1
    known, targets, columns = prepare(trainer, batch, values)
    if known.old_logprobs is None and not learns:
        known.old_logprobs = log_probs(trainer, batch)  # to be compared with the engines'
    before = None if known.old_logprobs is None else (known.old_logprobs, batch)
    updates: list[dict[str, float]] = []
    for _ in range(cfg.epochs_per_batch if learns else 0):
        for samples in updates_of(batch, cfg.updates_per_batch):
            part = batch.select(samples) if several else batch
            report, logprobs = _update(trainer, part, columns.at(tokens_of(batch, samples)), taken=len(updates))
            updates.append(report)
            before = before or (logprobs, part)
    assert before is not None
    trainer.version += 1
    _move_reference(trainer)
    train_s = time.perf_counter() - begun
    found = {
        **(metrics.mean_of_updates(updates) if updates else {}),
        **({**metrics.mismatch(*before, version), **metrics.off_policy(*before)} if algorithm.needs_rollouts else {}),
        **without_replay,
        **_changed_experts(trainer, batch),
        **metrics.staleness(batch, version),
        **metrics.advantage_stats(targets.advantages[batch.loss_mask]),
        **metrics.teachers(known, list(trainer.cfg.algorithm.teachers)),
        **targets.metrics,
        **(_speed(trainer, batch, train_s) if updates else {}),
        "time/train_s": train_s,
    }
    return found, targets.returns


def _without_replay(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """mismatch/logprob_abs_diff_without_replay: what the first samples of a batch, about one micro-batch a rank, would show if the trainer
    chose the experts itself; at the price of their log-probs."""
    if batch.experts is None or not trainer.algorithm.needs_rollouts:
        return {}
    parallel = trainer.parallel
    room = trainer.cfg.trainer.max_tokens_per_rank * parallel.dp_cp.size()
    first = replace(batch.first(room), experts=None)
    found = metrics.mismatch(log_probs(trainer, first), first, trainer.version)
    diff = found.get("mismatch/logprob_abs_diff")
    return {} if diff is None else {"mismatch/logprob_abs_diff_without_replay": diff}


def _changed_experts(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """mismatch/experts_changed_frac: of the tokens x layers whose experts an engine named, those that the trainer would send to others."""
    if batch.experts is None:
        return {}
    counts = torch.tensor(routing.take_counts(trainer.model.stages), dtype=torch.float64, device=trainer.device.torch)
    dist.all_reduce(counts)
    replayed, changed = counts.tolist()
    return {"mismatch/experts_changed_frac": changed / replayed} if replayed else {}


def _speed(trainer: Trainer, batch: Batch, train_s: float) -> dict[str, float]:
    """perf/*; those of GPUs on GPUs alone. Memory is the most that any rank's tensors took since the last batch."""
    epochs, most = trainer.cfg.trainer.epochs_per_batch, trainer.device.most_memory()
    tokens = len(batch.tokens) * epochs
    speed = {"perf/tokens_per_s": tokens / train_s}
    if most is None:
        return speed
    name, peak = most
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    flops = epochs * performance.train_flops(trainer.model.map, batch.lengths)
    return speed | performance.of_gpus(name, trainer.parallel.world, tokens, flops, train_s, float(peak))


def prepare(trainer: Trainer, batch: Batch, values: np.ndarray | None = None) -> tuple[Step, Targets, Columns]:
    """What the algorithm has asked for of the whole batch, what it makes of that, and what its loss reads; before the first optimizer
    step. All ranks call it together; `values` (float32 [T]) are those of a critic. Raises ValueError for an algorithm that uses a critic
    and says nothing of what that is to learn."""
    algorithm, said = trainer.algorithm, ask_teachers(trainer, batch)
    needs_old = algorithm.needs_old_logprobs or (trainer.steps_per_batch > 1 and algorithm.uses_old_logprobs)
    known = Step(
        batch,
        old_logprobs=log_probs(trainer, batch) if needs_old else None,
        ref_logprobs=None if trainer.reference is None else log_probs(trainer, batch, trainer.reference),
        teacher_logprobs=said.logprobs,
        values=values,
    )
    targets = algorithm.targets(known)
    if values is not None and targets.returns is None:
        raise ValueError(
            f"algorithm.name={trainer.cfg.algorithm.name}: it uses a critic, and its targets have no returns for that to learn; set "
            "Targets.returns"
        )
    scale = 1.0 if algorithm.importance_scale is None else algorithm.importance_scale(known)
    return known, targets, Columns(targets.advantages, known.old_logprobs, known.ref_logprobs, said, scale)


def _move_reference(trainer: Trainer) -> None:
    """algorithm.reference_every updates after it last was, the reference is the current policy."""
    every = trainer.cfg.algorithm.reference_every
    if trainer.reference is not None and every and trainer.version % every == 0:
        trainer.reference.become(trainer.model)
        trainer.reference_moved = True


def _update(trainer: Trainer, part: Batch, columns: Columns, taken: int) -> tuple[dict[str, float], np.ndarray]:
    """One optimizer step, after `taken` others on the same batch; returns its metrics and the log-probs (float32 [T]) before it."""
    micro_batches = trainer.micro_batches(part)
    with trainer.tracer.span("forward_backward", tokens=len(part.tokens), micro_batches=len(micro_batches)):
        sums, logprobs = accumulate_gradients(trainer, part, micro_batches, columns)
    with trainer.tracer.span("optimizer"):
        step_taken = take_step(trainer, sums["loss"], taken)
    weight = sums.pop("weight")
    report = {f"train/{name}": value / weight if weight else 0.0 for name, value in sums.items()}
    report["train/loss"] = sums["loss"]
    report |= {"train/grad_norm": step_taken["grad_norm"], "train/lr": step_taken["lr"]}
    report["train/micro_batches"] = float(len(micro_batches))
    report["train/tokens"] = float(np.count_nonzero(part.loss_mask))
    return report, logprobs


def accumulate_gradients(
    trainer: Trainer, part: Batch, micro_batches: list[MicroBatch], columns: Columns
) -> tuple[dict[str, float], np.ndarray]:
    """Forward and backward over this rank's micro-batches of an update; gradients of the whole update's loss are left reduced.

    Returns the sums over the whole update of w_t x_t for the loss, each metric of the algorithm and 1 ("weight"), and the log-probs of the
    forward pass (float32 [T]).
    """
    cfg, device = trainer.cfg, trainer.device.torch
    weights = token_weights(part, cfg.algorithm.aggregation, cfg.rollout.max_response_tokens)

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    def loss_of(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor], np.ndarray, Tensor]:
        logprobs, entropy = of_labels(trainer, micro_batch, logits, trainer.model.map)
        at = micro_batch.trained
        outputs = trainer.algorithm.loss(
            LossInputs(
                logprobs=logprobs,
                old_logprobs=logprobs.detach() if columns.old_logprobs is None else on_device(columns.old_logprobs[at]),
                entropy=entropy,
                advantages=on_device(columns.advantages[at]),
                rollout_logprobs=on_device(part.rollout_logprobs[at]),
                sequences=SequencesOfRanks(torch.from_numpy(micro_batch.sample).to(device), len(micro_batch.lengths), trainer.parallel.cp),
                ref_logprobs=None if columns.ref_logprobs is None else on_device(columns.ref_logprobs[at]),
                distillation=divergence_from(trainer, part, columns.said, micro_batch, logits),
                importance_scale=columns.importance_scale,
            )
        )
        w = on_device(weights[at])
        sums = weighted_sums(w, {"loss": outputs.loss.detach(), **outputs.metrics})
        return (w * outputs.loss).sum(), sums, at, logprobs.detach()

    return accumulate(trainer, micro_batches, loss_of, len(part.tokens))
