"""Two optimizer steps against Adam's formula in HF space, one knob at a time. In one step both betas cancel."""

import numpy as np
import pytest
import torch

from tests.trainer.ranks import gradients, make_batch, make_cfg, weights

pytestmark = pytest.mark.e2e
SETTINGS = {"clip_grad": 0.0, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "lr": 1e-3, "weight_decay": 0.0}


def steps(place, cfg, batches):
    """[(HF gradient before clipping, weights after it)] of a step a batch, the first entry's gradient None."""
    from slime.trainer import step

    trainer = place.trainer(cfg)
    found = [(None, weights(trainer))]
    for batch in batches:
        step.accumulate_gradients(trainer, batch, trainer.micro_batches(batch), step.prepare(trainer, batch)[2])
        grads = {name: grad.clone() for name, grad in gradients(trainer).items()}
        step.train_batch(trainer, batch)
        found.append((grads, weights(trainer)))
    return found


def adam(start, grads, clip_grad, beta1, beta2, eps, lr, weight_decay):
    """Algorithm 1 of arXiv 1412.6980 over the gradients, each clipped to a global norm, with the decoupled decay of arXiv 1711.05101:
    the weights after all steps, fp64."""
    weights = {name: w.double() for name, w in start.items()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, grad in enumerate(grads, 1):
        norm = torch.stack([g.double().norm() for g in grad.values()]).norm().item()
        scale = min(1.0, clip_grad / norm) if clip_grad else 1.0
        for name, w in weights.items():
            g = grad[name].double() * scale
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            step = m[name] / (1 - beta1**t) / ((v[name] / (1 - beta2**t)).sqrt() + eps)
            decay = weight_decay if w.ndim > 1 else 0.0
            weights[name] = w - lr * (step + decay * w)
    return weights


def error(found, expected, lr):
    """Largest difference, in learning rates."""
    return max((found[name].double() - w).abs().max().item() for name, w in expected.items()) / lr


CHANGES = [
    {"clip_grad": 0.05, "eps": 1e-3},
    {"beta1": 0.5},
    {"beta2": 0.6},
    {"eps": 1e-2},
    {"weight_decay": 0.3},
    {"lr": 3e-3},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "+".join(change))
def test_a_knob_of_the_optimizer_does_what_adams_formula_says(ranks, models, change):
    settings = {**SETTINGS, **change}
    batches = [make_batch(vocab=77, seed=seed) for seed in range(2)]
    found = ranks.run(steps, 1, make_cfg(models["qwen3"], **settings), batches)[0]
    start, grads, after = found[0][1], [grad for grad, _ in found[1:]], found[-1][1]
    assert error(after, adam(start, grads, **settings), settings["lr"]) < 2e-3
    for knob in change:  # the formula without the knob is another one, so that the test sees it
        without = adam(start, grads, **{**settings, knob: SETTINGS[knob]})
        assert error(after, without, settings["lr"]) > 2e-2, knob


def test_clipping_scales_a_gradient_that_is_spread_over_ranks(ranks, models):
    """TP 2 x DP 2: the norm is that of all shards, each counted once."""
    settings = {**SETTINGS, "clip_grad": 0.05, "eps": 1e-3}
    batches = [make_batch(vocab=77, seed=seed) for seed in range(2)]
    one = ranks.run(steps, 1, make_cfg(models["qwen3"], **settings), batches)[0]
    four = ranks.run(steps, 4, make_cfg(models["qwen3"], tensor_parallel=2, **settings), batches)[0]
    assert error(four[-1][1], {name: w.double() for name, w in one[-1][1].items()}, settings["lr"]) < 2e-3


def norms(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    return [step.train_batch(trainer, batch)["train/grad_norm"] for _ in range(2)]


def test_the_reported_norm_is_the_one_before_clipping(ranks, models):
    batch = make_batch(vocab=77)
    clipped, free = (ranks.run(norms, 1, make_cfg(models["qwen3"], clip_grad=clip), batch)[0] for clip in (1e-3, 0.0))
    assert clipped[0] == free[0] > 1e-3 and np.isfinite(clipped).all()
