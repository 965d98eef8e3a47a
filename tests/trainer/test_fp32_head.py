"""Logits in fp32 of a model in bf16: the product of the same hidden states and weights, unrounded, and a gradient all the same."""

import numpy as np
import pytest
import torch

from tests.trainer.ranks import make_batch, make_cfg

pytestmark = pytest.mark.e2e


def heads(place, cfg, batch):
    """What went into the head's first product and what came out, and the gradient's norm of the step."""
    from slime.trainer.step import train_batch

    trainer = place.trainer(cfg)
    layer, seen = trainer.model.stages[-1].module.output_layer, []
    layer.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0], kwargs.get("weight"), out[0])), with_kwargs=True)
    norm = train_batch(trainer, batch)["train/grad_norm"]
    hidden, weight, logits = seen[0]
    weight = layer.weight if weight is None else weight
    return hidden.detach(), weight.detach(), logits.detach(), norm


@pytest.mark.parametrize(("kind", "world"), [("qwen3", 1), ("qwen3_tied", 1), pytest.param("qwen3_tied", 2, marks=pytest.mark.slow)])
def test_logits_are_rounded_nowhere(ranks, models, kind: str, world: int) -> None:
    """Two ranks have a share of the vocabulary each; of the tokens they have a stretch each, and gather them."""
    cfg, batch = make_cfg(models[kind], "bf16", tensor_parallel=world), make_batch(vocab=77)
    [(_, _, rounded, norm), *_] = ranks.run(heads, world, cfg, batch)
    cfg.rollout.sglang = {"enable_fp32_lm_head": True}
    wide = ranks.run(heads, world, cfg, batch)
    hidden = torch.cat([of_rank[0] for of_rank in wide])
    for _, weight, logits, wide_norm in wide:
        assert (hidden.dtype, weight.dtype, logits.dtype) == (torch.float32,) * 3
        exact = hidden.double() @ weight.double().T
        assert np.abs((logits - exact).numpy()).max() < 1e-5
        assert abs(wide_norm / norm - 1) < 0.02
    first = hidden.double() @ wide[0][1].double().T
    assert rounded.dtype == torch.bfloat16 and 1e-4 < (rounded.double() - first).abs().mean() < 0.01
