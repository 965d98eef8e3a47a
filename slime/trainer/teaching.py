"""What teachers say of a batch: of the tokens drawn and of their own likeliest ones before it is trained on, all of it while it is.

A served teacher has said it when the batch comes: the columns teacher_*. The others are held by the actor's ranks, in the actor's layout;
each sees its own samples alone.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slime.algorithms.distillation import divergence, kind_of, with_tail
from slime.trainer.forward import output_of
from slime.trainer.frozen import Frozen
from slime.trainer.full_divergence import full_divergence
from slime.trainer.known_logprobs import known_logprobs, top_ids
from slime.trainer.packing import MicroBatch, pack
from slime.trainer.passes import gather, log_probs, look, tokens_of
from slime.trainer.state import Trainer
from slime.types import NO_TEACHER, Batch


@dataclass
class Said:
    """Of a batch of T tokens, 0 outside loss_mask; what algorithm.distill asks for, None otherwise."""

    logprobs: np.ndarray | None = None  # float32 [T], distill=sampled: of the tokens drawn
    ids: np.ndarray | None = None  # int64 [T, k], distill=topk: the teacher's likeliest tokens
    known: np.ndarray | None = None  # float32 [T, k + 1], their log-probs, and of all others together


def ask_teachers(trainer: Trainer, batch: Batch) -> Said:
    """All ranks call it together. Raises ValueError for a batch that does not say who teaches its samples, or without what a served teacher
    said of them."""
    distill = trainer.cfg.algorithm.distill
    if distill == "none":
        return Said()
    _check(trainer, batch)
    if distill == "full":
        return Said()
    said = _served(trainer, batch)
    for position, teacher in trainer.teachers.items():
        samples = np.flatnonzero(batch.teacher == position)
        if len(samples):
            part, at = batch.select(samples), tokens_of(batch, samples)
            if said.logprobs is not None:
                said.logprobs[at] = log_probs(trainer, part, teacher)
            if said.ids is not None and said.known is not None:
                said.ids[at], said.known[at] = _likeliest(trainer, part, teacher)
    return said


def _check(trainer: Trainer, batch: Batch) -> None:
    cfg = trainer.cfg.algorithm
    served = {number: name for number, name in enumerate(cfg.teachers) if number not in trainer.teachers}
    if batch.teacher is None or (batch.teacher == NO_TEACHER).any() or batch.teacher.max() >= len(cfg.teachers):
        raise ValueError(
            f"the batch does not say who of {', '.join(cfg.teachers)} teaches its samples: generate it with algorithm.teachers"
        )
    needed = batch.teacher_logprobs if cfg.distill == "sampled" else batch.teacher_top
    if np.isin(batch.teacher, list(served)).any() and needed is None:
        raise ValueError(
            f"the batch does not hold what algorithm.distill={cfg.distill} asks of {', '.join(served.values())}: generate it with this "
            "recipe, or remove algorithm.teachers.<name>.url and cluster.roles.teacher/<name>"
        )


def _served(trainer: Trainer, batch: Batch) -> Said:
    """What the batch itself holds."""
    cfg, tokens = trainer.cfg.algorithm, len(batch.tokens)
    if cfg.distill == "sampled":
        return Said(logprobs=np.zeros(tokens, np.float32) if batch.teacher_logprobs is None else batch.teacher_logprobs.copy())
    ids, known = np.zeros((tokens, cfg.distill_top_k), np.int64), np.zeros((tokens, cfg.distill_top_k + 1), np.float32)
    if batch.teacher_ids is not None and batch.teacher_top is not None:
        at = batch.loss_mask & ~np.isin(batch.teacher[batch.sample_of_token], list(trainer.teachers))  # type: ignore[index]
        ids[at] = batch.teacher_ids[at]
        known[at] = with_tail(torch.from_numpy(batch.teacher_top[at])).numpy()
    return Said(ids=ids, known=known)


def _likeliest(trainer: Trainer, batch: Batch, teacher: Frozen) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, k], log-probs [T, k + 1]) of a teacher that is held here."""
    k, own, tp = trainer.cfg.algorithm.distill_top_k, teacher.map.vocab_size, trainer.parallel.tp
    common = min(own, trainer.model.map.vocab_size)

    def keep(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, tuple[np.ndarray, Tensor, Tensor]]:
        rows = torch.from_numpy(micro_batch.rows).to(logits.device)
        ids = top_ids(logits, rows, k, common, tp)
        known = known_logprobs(logits, rows, ids, trainer.temperature, own, tp)
        return known.sum(), (micro_batch.trained, ids, known)

    kept = look(trainer, batch, keep, teacher)
    tokens = len(batch.tokens)
    ids = gather(trainer, [(at, ids) for at, ids, _ in kept], tokens, (k,), torch.int64)
    return ids, gather(trainer, [(at, known) for at, _, known in kept], tokens, (k + 1,))


def divergence_from(trainer: Trainer, part: Batch, said: Said, micro_batch: MicroBatch, logits: Tensor) -> Tensor | None:
    """fp32 [t], of the student's distributions at a micro-batch's trained tokens from their teachers', with its gradient; None where the
    recipe asks for none. logits [L, this rank's share of the vocabulary]; `part` and `said` are the update's."""
    cfg = trainer.cfg.algorithm
    if cfg.distill == "full":
        return _whole(trainer, part, micro_batch, logits)
    if said.ids is None or said.known is None:
        return None
    rows, ids = (torch.from_numpy(x).to(logits.device) for x in (micro_batch.rows, said.ids[micro_batch.trained]))
    vocab_size, tp = trainer.model.map.vocab_size, trainer.parallel.tp
    own = known_logprobs(logits, rows, ids, trainer.temperature, vocab_size, tp)
    theirs = torch.from_numpy(said.known[micro_batch.trained]).to(logits.device)
    return divergence(own, theirs, kind_of(cfg.distill_beta), cfg.distill_beta)


def _whole(trainer: Trainer, part: Batch, micro_batch: MicroBatch, logits: Tensor) -> Tensor:
    """Every teacher's forward pass over its samples of the micro-batch. With experts that several data-parallel ranks share, all of these
    call it together, for want of samples on a row of padding."""
    assert part.teacher is not None, "checked"
    cfg, parallel = trainer.cfg.algorithm, trainer.parallel
    present = np.unique(part.sample_of_token[micro_batch.source[micro_batch.source >= 0]])
    found = torch.zeros(len(micro_batch.rows), dtype=torch.float32, device=logits.device)
    for position, teacher in trainer.teachers.items():
        samples = present[part.teacher[present] == position]
        if not len(samples) and teacher.config.expert_model_parallel_size == 1:
            continue
        own = pack(replace(part, experts=None), samples, parallel.tp.size(), parallel.cp.rank(), parallel.cp.size())
        with torch.no_grad():
            (stage,) = teacher.stages
            theirs = output_of(teacher, stage, own, logits.device, parallel.tp).squeeze(0)
        of_student, of_teacher = _same_tokens(micro_batch.trained, own.trained)
        at, rows, teacher_rows = (
            torch.from_numpy(x).to(logits.device) for x in (of_student, micro_batch.rows[of_student], own.rows[of_teacher])
        )
        common = min(teacher.map.vocab_size, trainer.model.map.vocab_size)
        beta = cfg.distill_beta
        values = full_divergence(logits, theirs, rows, teacher_rows, trainer.temperature, common, parallel.tp, kind_of(beta), beta)
        found = found.index_add(0, at, values)
    return found


def _same_tokens(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `theirs` (distinct positions in the batch, all of them among `ours`) lies in both: int64, int64."""
    order = np.argsort(ours)
    where = order[np.searchsorted(ours, theirs, sorter=order)]
    assert (ours[where] == theirs).all(), "a rank holds the same tokens of a sequence in every row"
    return where, np.arange(len(theirs))
