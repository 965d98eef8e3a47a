"""What lies on the path of CPU engines: batch-invariant products, seeded sampling's hash, torchvision, the plugin's entry point."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from slime.cpu import serving


def load(name: str) -> ModuleType:
    """A module of the directory, without the directory on this process's path."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "."), serving.SHIMS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "n"), [(128, 256), (96, 80), (384, 128)])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype, k: int, n: int) -> None:
    invariant = load("slime_batch_invariant")
    torch.manual_seed(0)
    weight, rows, bias = torch.randn(n, k).to(dtype), torch.randn(70, k).to(dtype), torch.randn(n).to(dtype)
    whole = invariant.mm(rows, weight.t())
    torch.testing.assert_close(whole, rows @ weight.t())
    for size in (1, 3, 7, 16, 17, 33):
        for at in (0, 5, 36):
            part = rows[at : at + size]
            assert torch.equal(invariant.mm(part, weight.t()), whole[at : at + size])
            assert torch.equal(invariant.addmm(bias, part, weight.t()), bias + whole[at : at + size])
    assert invariant.mm(rows[:0], weight.t()).shape == (0, n)


@pytest.mark.e2e
def test_linear_layers_use_the_blocks_once_enabled() -> None:
    """In another process: the replacement is for good."""
    code = """
import torch, slime_batch_invariant as s
torch.manual_seed(0)
x, w, b = torch.randn(64, 128), torch.randn(300, 128), torch.randn(300)
s.enable(); s.enable(enable_bmm=True)
for bias in (None, b):
    f = lambda rows: torch.nn.functional.linear(rows, w, bias)
    assert all(torch.equal(f(x[i:i+m]), f(x)[i:i+m]) for m in (1, 3, 5, 17) for i in range(0, 40, 7))
assert torch.equal(torch.matmul(x[:3], w.t()), torch.matmul(x, w.t())[:3])
"""
    run_among_shims(code)


def test_murmur_hash() -> None:
    """Reference values of MurmurHash3_x86_32 with seed 0 over four little-endian 32-bit words."""
    murmur = load("sgl_kernel/murmur_hash")

    def reference(words: list[int]) -> int:
        h = 0
        for k in words:
            k = k * 0xCC9E2D51 & 0xFFFFFFFF
            k = (k << 15 | k >> 17) & 0xFFFFFFFF
            h ^= k * 0x1B873593 & 0xFFFFFFFF
            h = ((h << 13 | h >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64 & 0xFFFFFFFF
        h ^= 16
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    seeds = [0, 1, 2**31, 2**33 + 5, 2**62 + 12345]
    positions, columns = [0, 7, 100, 5000, 2**20], [0, 1, 79, 150_000]
    found = murmur.murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns))
    assert found.dtype == torch.uint32
    expected = [[reference([s & 0xFFFFFFFF, s >> 32, p, c]) for c in columns] for s, p in zip(seeds, positions, strict=True)]
    assert found.tolist() == expected


def test_entry_point_is_found_on_the_path() -> None:
    [distribution] = importlib.metadata.distributions(path=[str(serving.SHIMS)])
    [entry] = distribution.entry_points
    assert (entry.group, entry.value) == ("sglang.srt.plugins", "slime_sglang_cpu:register")
    assert (serving.SHIMS / "slime_sglang_cpu.py").exists()


@pytest.mark.e2e
def test_torchvision_and_the_kernel_stub_import() -> None:
    run_among_shims(
        """
import sys
assert "torch" not in sys.modules, "processes without torch stay without it"
import torchvision, sgl_kernel, torch
from sgl_kernel import some_kernel
try:
    some_kernel(1)
except NotImplementedError as error:
    assert "sgl_kernel.some_kernel has no CPU form" in str(error)
assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed"), "SGLang would take the AMX path"
"""
    )


@pytest.mark.e2e
def test_filtered_draws_are_the_plain_ones_where_nothing_is_filtered() -> None:
    run_among_shims(
        """
import torch, slime_seeded_sampling as s
from sglang.srt.layers import sampler
torch.manual_seed(0)
B, V = 200, 50
probs = torch.softmax(torch.randn(B, V) * 2, -1)
seed, positions = torch.arange(B) + 7, torch.arange(B) % 9
all_k, min_p = torch.full((B,), 1 << 30), torch.zeros(B)
plain = sampler.sampling_from_probs_torch(probs.clone(), sampling_seed=seed, positions=positions)
assert torch.equal(s.sample(probs.clone(), all_k, torch.ones(B), min_p, False, seed, positions), plain)
assert torch.equal(s.sample(probs.clone(), torch.ones(B).long(), torch.ones(B), min_p, False, seed, positions), probs.argmax(-1).int())
kept = s.filter_probs(probs, all_k, torch.full((B,), 0.7))
mass = kept.sum(-1)
smallest = torch.where(kept > 0, kept, torch.inf).min(-1).values
assert (mass >= 0.7 - 1e-6).all() and (mass - smallest < 0.7 + 1e-6).all(), "the smallest set of that mass"
assert ((kept > 0).sum(-1) > 0).all() and (s.filter_probs(probs, torch.full((B,), 3), torch.ones(B)) > 0).sum(-1).eq(3).all()
drawn = s.sample(probs.clone(), all_k, torch.full((B,), 0.7), min_p, False, seed, positions).long()
assert (kept.gather(1, drawn[:, None]) > 0).all()
""",
        timeout=90,
    )


def run_among_shims(code: str, timeout: float = 30) -> None:
    environment = {"PATH": "/usr/bin:/bin", **serving.environment(deterministic=True)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
