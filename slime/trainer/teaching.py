"""What teachers say of a batch: of the tokens drawn and of their own likeliest ones before it is trained on, all of it while it is.

A served teacher has said it when the batch comes: the columns teacher_*. The others are held by the actor's ranks, in the actor's layout;
each sees its own samples alone. In rollout.mode=sync they read groups that are finished while engines generate others (`read_ahead`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from slime.algorithms.distillation import divergence, kind_of, with_tail
from slime.config.roles import reads_groups
from slime.trainer.forward import output_of
from slime.trainer.frozen import Frozen
from slime.trainer.full_divergence import full_divergence
from slime.trainer.known_logprobs import known_logprobs, top_ids
from slime.trainer.packing import MicroBatch, pack
from slime.trainer.passes import gather, log_probs, look
from slime.trainer.said import Heard, Said
from slime.trainer.state import Trainer
from slime.types import NO_TEACHER, Batch


def read_ahead(trainer: Trainer, groups: Sequence[Batch]) -> None:
    """Let the teachers that are held here read finished groups while engines generate others; `ask_teachers` takes what they say. All ranks
    call it together."""
    for group in groups:
        _check(trainer, group)
    own = [group.select(_own(trainer, group)) for group in groups]
    _read(trainer, [group for group in own if len(group)])


def ask_teachers(trainer: Trainer, batch: Batch) -> Said:
    """All ranks call it together. Raises ValueError for a batch that does not say who teaches its samples, or without what a served teacher
    said of them."""
    distill = trainer.cfg.algorithm.distill
    if distill == "none":
        return Said()
    _check(trainer, batch)
    if distill == "full":
        return Said()
    said, own = _served(trainer, batch), _own(trainer, batch)
    if not reads_groups(trainer.cfg):
        if len(own):
            said.put(batch.tokens_at(own), _say(trainer, [batch.select(own)])[0])
        return said
    groups = {int(ordinal): own[batch.group[own] == ordinal] for ordinal in np.unique(batch.group[own])}
    _read(trainer, [batch.select(samples) for ordinal, samples in groups.items() if ordinal not in trainer.heard])
    for ordinal, samples in groups.items():
        at, heard = batch.tokens_at(samples), trainer.heard[ordinal]
        assert np.array_equal(heard.tokens, batch.tokens[at]), f"teachers have read another answer to prompt {ordinal}"
        said.put(at, heard.said)
    trainer.heard.clear()  # what is not in the batch too
    return said


def _own(trainer: Trainer, batch: Batch) -> np.ndarray:
    """int64, the samples whose teachers are held here."""
    return np.flatnonzero(np.isin(batch.teacher, list(trainer.teachers)))  # type: ignore[arg-type]


def _read(trainer: Trainer, groups: list[Batch]) -> None:
    """Keep what is said of each."""
    for group, said in zip(groups, _say(trainer, groups), strict=True):
        trainer.heard[int(group.group[0])] = Heard(group.tokens.copy(), said)


def _say(trainer: Trainer, groups: list[Batch]) -> list[Said]:
    """What the teachers that are held here say of each, all of whose samples are theirs. No row holds samples of two groups, so that what
    is said of one does not depend on those that are read with it: a run that was killed reads others together, and has the same bits."""
    interleaved = trainer.parallel.sizes.virtual > 1  # rows of one pass have one length there: a pass for each
    if not groups or (interleaved and len(groups) > 1):
        return [_say(trainer, [group])[0] for group in groups]
    cfg, batch = trainer.cfg.algorithm, Batch.concatenate(groups)
    apart = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    found = Said.nothing(cfg.distill, len(batch.tokens), cfg.distill_top_k)
    with trainer.tracer.span("held_teacher", groups=len(groups)):
        for position, teacher in trainer.teachers.items():
            samples = np.flatnonzero(batch.teacher == position)
            if len(samples):
                said = _say_of(trainer, batch.select(samples), teacher, None if interleaved else apart[samples])
                found.put(batch.tokens_at(samples), said)
    ends = np.cumsum([len(group.tokens) for group in groups])
    return [found.at(slice(end - len(group.tokens), end)) for group, end in zip(groups, ends, strict=True)]


def _say_of(trainer: Trainer, batch: Batch, teacher: Frozen, apart: np.ndarray | None) -> Said:
    """What one teacher says of a batch that is all its own."""
    if trainer.cfg.algorithm.distill == "sampled":
        return Said(logprobs=log_probs(trainer, batch, teacher, apart=apart))
    ids, known = _likeliest(trainer, batch, teacher, apart)
    return Said(ids=ids, known=known)


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
    cfg = trainer.cfg.algorithm
    said = Said.nothing(cfg.distill, len(batch.tokens), cfg.distill_top_k)
    if said.logprobs is not None and batch.teacher_logprobs is not None:
        said.logprobs[:] = batch.teacher_logprobs
    if said.ids is not None and said.known is not None and batch.teacher_ids is not None and batch.teacher_top is not None:
        at = batch.loss_mask & ~np.isin(batch.teacher[batch.sample_of_token], list(trainer.teachers))  # type: ignore[index]
        said.ids[at] = batch.teacher_ids[at]
        said.known[at] = with_tail(torch.from_numpy(batch.teacher_top[at])).numpy()
    return said


def _likeliest(trainer: Trainer, batch: Batch, teacher: Frozen, apart: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(ids [T, k], log-probs [T, k + 1]) of a teacher that is held here."""
    k, own, tp = trainer.cfg.algorithm.distill_top_k, teacher.map.vocab_size, trainer.parallel.tp
    common = min(own, trainer.model.map.vocab_size)

    def keep(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, tuple[np.ndarray, Tensor, Tensor]]:
        rows = torch.from_numpy(micro_batch.rows).to(logits.device)
        ids = top_ids(logits, rows, k, common, tp)
        known = known_logprobs(logits, rows, ids, trainer.temperature, own, tp)
        return known.sum(), (micro_batch.trained, ids, known)

    kept = look(trainer, batch, keep, teacher, apart=apart)
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
