"""A rank's memory given up and taken back: to the bit, in place, with everything that refers to it."""

import pytest
import torch

from tests.trainer.ranks import KIND, make_batch, make_cfg, weights

pytestmark = pytest.mark.e2e


def recipe(models, **trainer):
    cfg = make_cfg(models["qwen3"], "bf16", weight_decay=0.1, **trainer)
    cfg.algorithm.kl_loss_coef = 0.01  # with a reference
    return cfg


def turns(place, cfg, batches):
    """(weights after all batches of a straight run, of one whose memory is given up before each; bytes freed, and that stayed)."""
    from slime.trainer import publish, step
    from slime.trainer.offload import Offload

    straight = place.trainer(cfg)
    for batch in batches:
        step.train_batch(straight, batch)
    meant = weights(straight)
    del straight
    trainer = place.trainer(cfg)
    base = publish.take_base(trainer.model, trainer.parallel, "run")
    offload, freed, stayed = Offload(pinned=KIND == "cuda"), [], []
    referring = [tensor for _, tensor in trainer.model.tensors()] + list(base.held)
    movable = referring if KIND == "cuda" else [tensor for _, tensor in trainer.model.tensors()]  # NumPy has seen the snapshot on a CPU
    for batch in batches:
        bits = [tensor.detach().clone().cpu() for tensor in referring]
        freed.append(offload.leave([trainer], [base]))
        assert offload.away and all(tensor.untyped_storage().nbytes() == 0 for tensor in movable)
        stayed.append(torch.cuda.memory_allocated() if KIND == "cuda" else 0)
        offload.enter()
        assert not offload.away
        assert all(torch.equal(tensor.cpu(), was) for tensor, was in zip(referring, bits, strict=True))
        assert not any(buffer.grad_data.any() for stage in trainer.model.stages for buffer in stage.buffers)
        step.train_batch(trainer, batch)
    _, summary = publish.encode(base, trainer, "steps", 1 << 20)
    return meant, weights(trainer), freed, stayed, sum(summary.changed)


@pytest.mark.parametrize(("world", "sizes"), [(1, {}), (2, {}), (2, {"tensor_parallel": 2})], ids=["one", "dp2", "tp2"])
def test_training_goes_on_to_the_bit(ranks, models, world, sizes):
    cfg = recipe(models, **sizes)
    cfg.run.steps = 3
    batches = [make_batch(vocab=77, seed=seed) for seed in range(3)]
    for meant, found, freed, stayed, changed in ranks.run(turns, world, cfg, batches):
        assert meant.keys() == found.keys() and all(torch.equal(tensor, found[name]) for name, tensor in meant.items())
        assert len(set(freed)) == 1 and freed[0] > 0, "the same every time"
        assert max(stayed) < freed[0] / 4
        assert changed > 0, "the snapshot is the base still"


def freed_of(place, cfg):
    """(bytes freed of a trainer and its critic, bytes of what must be among them)."""
    from slime.trainer.offload import Offload

    trainer = place.trainer(cfg)
    critic = place.critic(cfg, trainer)
    meant = 0
    for trained in (trainer, critic):
        for stage in trained.model.stages:
            meant += sum(buffer.param_data.nbytes + buffer.grad_data.nbytes for buffer in stage.buffers)
        for part in trained.model.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                meant += sum(main.nbytes for main in group["params"])
            meant += sum(value.nbytes for state in part.optimizer.state.values() for value in state.values())
    offload = Offload(pinned=KIND == "cuda")
    freed = offload.leave([trainer, critic], [])
    with pytest.raises(AssertionError, match="given up already"):
        offload.leave([trainer], [])
    offload.enter()
    with pytest.raises(AssertionError, match="was not given up"):
        offload.enter()
    return freed, meant


def test_a_critic_beside_goes_too(ranks, models):
    cfg = make_cfg(models["qwen3"], "bf16")
    cfg.algorithm.name = "ppo"
    [(freed, meant)] = ranks.run(freed_of, 1, cfg)
    assert freed >= meant > 0
