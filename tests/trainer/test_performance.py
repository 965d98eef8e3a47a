import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slime.models.registry import load_map
from slime.trainer.performance import PEAK_FLOPS, of_gpus, train_flops
from tests.tiny import load_hf_model, make_tiny


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tmp_path, tied):
    """torch counts attention over all pairs; ours is causal. Rotary frequencies, 2 products of a head's width, are not counted by us."""
    path = make_tiny(tmp_path, "qwen3", tied=tied, vocab=77)
    model = load_hf_model(path)
    model.set_attn_implementation("eager")
    lengths = np.array([40, 7])
    with FlopCounterMode(display=False) as counter:
        for n in lengths:
            model(torch.ones(1, n, dtype=torch.int64)).logits.sum().backward()
    above_the_diagonal = 12 * 2 * 64 * (lengths * (lengths - 1) / 2).sum()  # 2 layers, 4 heads of 16
    assert train_flops(load_map(path), lengths) == pytest.approx(counter.get_total_flops() - above_the_diagonal, rel=2e-4)


def test_flops_of_experts_by_hand(tmp_path):
    """Two layers of width 64; 4 heads of 16 in 2 groups; 2 of 8 experts of 24; 80 ids."""
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    sparse = 64 * 8 + 2 * 3 * 64 * 24
    weights = 2 * attention + 2 * sparse + 64 * 80
    assert weights == 49152
    attended = 2 * 12 * 64 * (6 + 1)  # 6 pairs in three tokens, 1 in one
    assert train_flops(load_map(make_tiny(tmp_path, "qwen3_moe")), np.array([3, 1])) == 6 * 49152 * 4 + attended == 1190400


@pytest.mark.parametrize(("family", "q_rank", "queries"), [("deepseek_v3", 20, 64 * 20 + 20 * 4 * 20), ("deepseek_v2", None, 64 * 4 * 20)])
def test_flops_of_latent_attention_by_hand(tmp_path, family, q_rank, queries):
    """4 heads: queries and keys of 12 + 8 channels, values of 10, from a latent of 12; 4 of 8 experts of 24 and two shared ones."""
    latent = 64 * (12 + 8) + 12 * 4 * (12 + 10)
    attention = queries + latent + 4 * 10 * 64
    dense, sparse = 3 * 64 * 96, 64 * 8 + 3 * 64 * (4 * 24 + 2 * 24)
    weights = 2 * attention + dense + sparse + 64 * 80
    assert weights == {20: 67264, None: 71744}[q_rank]
    attended = 2 * 6 * (4 * 20 + 4 * 10) * 6  # 6 pairs in three tokens
    model = load_map(make_tiny(tmp_path, family, q_lora_rank=q_rank))
    assert train_flops(model, np.array([3])) == 6 * weights * 3 + attended


def test_weights_of_a_token_are_those_of_the_checkpoint(tmp_path):
    """All tensors that are matrices, of the 8 experts 4, and not the embedding."""
    model = load_map(make_tiny(tmp_path, "deepseek_v3"))
    shapes = {name: shape for name, shape in model.hf_shapes.items() if len(shape) == 2 and name != "model.embed_tokens.weight"}
    met = sum(np.prod(shape) * (0.5 if ".experts." in name else 1) for name, shape in shapes.items())
    attended = 2 * 6 * (4 * 20 + 4 * 10)
    assert train_flops(model, np.array([1])) == 6 * met + attended


def test_speeds_of_gpus():
    speed = of_gpus("NVIDIA H200", gpus=4, tokens=8000, flops=989.5e12, seconds=2.0, peak_bytes=3e9)
    assert speed == {"perf/tokens_per_s_per_gpu": 1000.0, "perf/gpu_mem_gb": 3.0, "perf/mfu": 1 / 8}


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_of_unknown_peak_has_no_mfu(name):
    assert of_gpus(name, 1, 10, 1e12, 1.0, 0.0).keys() == {"perf/tokens_per_s_per_gpu", "perf/gpu_mem_gb"}


def test_peaks_are_dense():
    """Sparsity would double them: nothing below Blackwell reaches 1 PFLOP/s."""
    assert all(1e14 < peak < 1e15 for name, peak in PEAK_FLOPS.items() if "B200" not in name)
