"""The reference of a KL: the model that the run began from, or the policy of some updates ago, which a checkpoint holds."""

import numpy as np
import pytest

from tests.trainer.ranks import make_batch, make_cfg, save

pytestmark = pytest.mark.e2e


def recipe(models, every=0, **trainer):
    cfg = make_cfg(models["qwen3"], lr=1e-2, **trainer)
    cfg.algorithm.kl_loss_coef, cfg.algorithm.reference_every = 0.1, every
    return cfg


def distances(place, cfg, batch, steps):
    """(largest difference of log-probs between policy and reference, train/ref_kl) after each update."""
    from slime.trainer import passes, step

    trainer, found = place.trainer(cfg), []
    for _ in range(steps):
        kl = step.train_batch(trainer, batch)["train/ref_kl"]
        ours, theirs = passes.log_probs(trainer, batch), passes.log_probs(trainer, batch, trainer.reference)
        found.append((float(np.abs(ours - theirs).max()), kl))
    return found


@pytest.mark.parametrize(("world", "knobs"), [(1, {}), (2, {"tensor_parallel": 2}), (2, {"pipeline_parallel": 2})])
def test_it_becomes_the_policy_every_so_many_updates(ranks, models, world, knobs) -> None:
    found = ranks.run(distances, world, recipe(models, every=2, **knobs), make_batch(vocab=77), 4)[0]
    assert [apart == 0 for apart, _ in found] == [False, True, False, True]
    kl = [value for _, value in found]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-6, "the first update starts at the reference"
    assert kl[2] == pytest.approx(0, abs=1e-9) and kl[3] > 1e-6, "and the third at the new one"


def test_a_fixed_one_stays(ranks, models) -> None:
    found = ranks.run(distances, 1, recipe(models), make_batch(vocab=77), 3)[0]
    assert 0 < found[0][0] < found[2][0]


def resumed(place, cfg, batch, directory, other):
    """Log-probs of the reference after three updates, those of a trainer of the recipe `other` that has loaded what was saved, and whether
    its next update is the same."""
    from slime.trainer import passes, shards, step

    trainer = place.trainer(cfg)
    for _ in range(3):
        step.train_batch(trainer, batch)
    save(trainer, directory)
    moved = trainer.reference_moved
    own = passes.log_probs(trainer, batch, trainer.reference)
    after = step.train_batch(trainer, batch)["train/grad_norm"]
    loaded = place.trainer(other)
    shards.load(loaded, directory)
    theirs = passes.log_probs(loaded, batch, loaded.reference)
    return moved, own, theirs, after == step.train_batch(loaded, batch)["train/grad_norm"]


@pytest.mark.parametrize("every", [0, 2])
def test_a_checkpoint_holds_one_that_has_moved(ranks, models, tmp_path, every) -> None:
    cfg = recipe(models, every=every)
    moved, own, theirs, same = ranks.run(resumed, 1, cfg, make_batch(vocab=77), tmp_path, cfg)[0]
    assert moved == bool(every) and np.array_equal(own.view(np.int32), theirs.view(np.int32)) and same


def test_it_stays_where_it_has_moved_when_it_moves_no_more(ranks, models, tmp_path) -> None:
    _, own, theirs, _ = ranks.run(resumed, 1, recipe(models, every=2), make_batch(vocab=77), tmp_path, recipe(models))[0]
    assert np.array_equal(own.view(np.int32), theirs.view(np.int32))


def test_it_loads_into_another_layout(ranks, models, tmp_path) -> None:
    whole, split = recipe(models, every=2), recipe(models, every=2, tensor_parallel=2)
    _, own, _, _ = ranks.run(resumed, 1, whole, make_batch(vocab=77), tmp_path, whole)[0]
    for found in ranks.run(read, 2, split, make_batch(vocab=77), tmp_path):
        assert np.abs(found - own).max() < 1e-5


def read(place, cfg, batch, directory):
    from slime.trainer import passes, shards

    trainer = place.trainer(cfg)
    shards.load(trainer, directory)
    return passes.log_probs(trainer, batch, trainer.reference)
