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


def test_speeds_of_gpus():
    speed = of_gpus("NVIDIA H200", gpus=4, tokens=8000, flops=989.5e12, seconds=2.0, peak_bytes=3e9)
    assert speed == {"perf/tokens_per_s_per_gpu": 1000.0, "perf/gpu_mem_gb": 3.0, "perf/mfu": 1 / 8}


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090"])
def test_a_gpu_of_unknown_peak_has_no_mfu(name):
    assert of_gpus(name, 1, 10, 1e12, 1.0, 0.0).keys() == {"perf/tokens_per_s_per_gpu", "perf/gpu_mem_gb"}


def test_peaks_are_dense():
    """Sparsity would double them: nothing below Blackwell reaches 1 PFLOP/s."""
    assert all(1e14 < peak < 1e15 for name, peak in PEAK_FLOPS.items() if "B200" not in name)
