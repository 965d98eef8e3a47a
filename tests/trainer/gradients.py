"""One update's loss and gradient, in Hugging Face's names, whatever the layout."""

from dataclasses import replace

import numpy as np
import pytest

from tests.trainer.ranks import gradients, make_cfg


def grpo_cfg(path, aggregation="sequence", **trainer):
    cfg = make_cfg(path, **trainer)
    cfg.algorithm.entropy_coef, cfg.algorithm.aggregation, cfg.rollout.temperature = 0.1, aggregation, 0.8
    return cfg


def log_probs(place, cfg, batch):
    from slime.trainer import passes

    return passes.log_probs(place.trainer(cfg), batch)


def gradient(place, cfg, batch, old, reorder=None, reference=None):
    """(loss, HF-space gradient, its norm by the optimizer) of one update; `reorder` packs the sequences at random instead of by plan,
    `reference` is the folder of another model than the policy's own: from that, whose KL is 0, no gradient would come. A critic's values
    are numbers that go with the tokens."""
    return gradient_of(place.trainer(cfg), batch, old, reorder, reference)


def gradients_by_recipe(place, recipes, batch, old, reference):
    """What `gradient` says of each recipe; they have one layout, whose groups meet once."""
    found, trainer = {}, None
    for name, cfg in recipes.items():
        trainer = place.trainer(cfg, trainer)
        found[name] = gradient_of(trainer, batch, old, reference=reference)
    return found


def gradient_of(trainer, batch, old, reorder=None, reference=None):
    from slime.trainer import step
    from slime.trainer.frozen import build_frozen
    from slime.trainer.packing import pack

    if trainer.reference is not None and reference is not None:
        trainer.reference = build_frozen(str(reference), "auto", trainer.cfg, trainer.parallel)
    micro_batches = trainer.micro_batches(batch)
    if reorder is not None:
        parts = np.array_split(np.random.default_rng(reorder).permutation(len(batch)), 3)
        micro_batches = [pack(batch, part, trainer.parallel.tp.size()) for part in parts]
    values = np.sin(5 * old).astype(np.float32) if trainer.algorithm.uses_critic else None
    _, _, columns = step.prepare(trainer, batch, values)
    sums, _ = step.accumulate_gradients(trainer, batch, micro_batches, replace(columns, old_logprobs=old))
    trainer.model.optimizer.prepare_grads()
    norm = trainer.model.optimizer.get_grad_norm()
    return sums["loss"], gradients(trainer), norm


def assert_same(found, expected, tolerance=1e-5):
    """Loss, every tensor's gradient and its norm within `tolerance`, relative; returns the worst tensor's distance."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    worst = 0.0
    for name, want in expected[1].items():
        distance = float((found[1][name] - want).norm())
        assert distance <= tolerance * float(want.norm()), name
        worst = max(worst, distance / float(want.norm() or 1.0))
    assert found[2] == pytest.approx(expected[2], rel=tolerance)
    return worst


def noisy_old(batch, logprobs):
    return (logprobs + np.random.default_rng(1).normal(0, 0.2, len(logprobs)) * batch.loss_mask).astype(np.float32)
