"""Balancing without a loss: the bias that a router chooses with moves against the load, by the same steps in every layout."""

import pytest
import torch

from slime.models.registry import load_map
from tests.tiny import make_tiny
from tests.trainer.ranks import make_batch, make_cfg, weights, with_experts

pytestmark = pytest.mark.e2e
RATE = 2.0**-6
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
LAYOUTS = {
    "DP2": {},
    "TP2 x EP2 x ETP1": {"tensor_parallel": 2, "expert_parallel": 2, "megatron": {"expert_tensor_parallel_size": 1}},
    "PP2": {"pipeline_parallel": 2},
    "CP2": {"context_parallel": 2},
    "PP2 x VPP2": {"pipeline_parallel": 2, "megatron": {"virtual_pipeline_model_parallel_size": 2}},
}


def updated(place, cfg, batch) -> dict[str, torch.Tensor]:
    from slime.trainer import step

    trainer = place.trainer(cfg)
    step.train_batch(trainer, batch)
    return weights(trainer)


def test_the_bias_moves_against_the_load_alike_in_every_layout(ranks, tmp_path) -> None:
    path = make_tiny(tmp_path, "deepseek_v3", vocab=77)
    batch = make_batch(vocab=77)
    batch = with_experts(batch, load_map(path).routing)
    before = ranks.run(updated, 1, make_cfg(path), batch)[0][BIAS]
    cfg = make_cfg(path, megatron={"moe_router_bias_update_rate": RATE})
    alone = ranks.run(updated, 1, cfg, batch)[0][BIAS]
    steps = (alone - before) / RATE
    assert alone.dtype == torch.float32 and set(steps.round().tolist()) <= {-1.0, 0.0, 1.0} and steps.abs().max() > 0.9
    for name in ("DP2", "TP2 x EP2 x ETP1", "PP2", "CP2"):
        layout = LAYOUTS[name]
        knobs = {**layout, "megatron": {**layout.get("megatron", {}), "moe_router_bias_update_rate": RATE}}
        assert torch.equal(ranks.run(updated, 2, make_cfg(path, **knobs), batch)[0][BIAS], alone), name


def test_padding_is_no_load(ranks, tmp_path) -> None:
    """Rows are padded by what the layout needs: sequences to chunks, rows of interleaved stages to the longest, up to whole empty ones."""
    path = make_tiny(tmp_path, "deepseek_v3", vocab=77, layers=4)
    batch = with_experts(make_batch(samples=5, vocab=77), load_map(path).routing)
    found = {}
    for name, world in (("alone", 1), ("CP2", 2), ("PP2 x VPP2", 2)):
        layout = LAYOUTS.get(name, {})
        knobs = {**layout, "megatron": {**layout.get("megatron", {}), "moe_router_bias_update_rate": RATE}}
        moved = ranks.run(updated, world, make_cfg(path, max_tokens_per_rank=60, **knobs), batch)[0]
        found[name] = torch.stack([tensor for name, tensor in moved.items() if name.endswith("correction_bias")])
    assert len(found["alone"]) == 3
    for name, moved in found.items():
        assert torch.equal(moved, found["alone"]), name


def test_without_a_rate_the_bias_stays(ranks, tmp_path) -> None:
    path = make_tiny(tmp_path, "deepseek_v3", vocab=77, dtype="bf16")
    from slime.models.hf_files import HFReader

    found = ranks.run(updated, 1, make_cfg(path, "bf16"), make_batch(vocab=77))[0][BIAS]
    with HFReader(path) as reader:
        assert found.dtype == torch.bfloat16 and torch.equal(found.view(torch.int16), reader.read(BIAS).view(torch.int16))
