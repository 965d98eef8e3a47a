"""The kernels between a layer's matrix products against plain torch in fp64: values and gradients.

They exist in Triton alone: they run interpreted on the CPU (TRITON_INTERPRET=1, which a test of vocabulary starts) and on a GPU
(SLIME_TEST_DEVICE=cuda).
"""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from slime.trainer.kernels import layer

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="these are Triton programs")
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # the interpreter takes its time
EPS = 1e-6
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2}}


def random(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)


def compare(ours, reference, *tensors):
    """Outputs and gradients of both, for the same inputs and the same gradients of the outputs."""
    dtype = tensors[0].dtype
    mine = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    found, expected = ours(*mine), reference(*exact)
    for n, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, **TOLERANCES[dtype])
        slope = random(*f.shape, dtype=dtype, seed=10 + n)
        f.backward(slope, retain_graph=True)
        e.backward(slope.double(), retain_graph=True)
    for m, e in zip(mine, exact, strict=True):
        scale = float(e.grad.abs().max())
        torch.testing.assert_close(m.grad.double() / scale, e.grad / scale, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 96), (3, 2, 2560), (1, 8), (1500, 4)])
def test_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    compare(lambda x, w: [layer.rms_norm(x, w, EPS)], lambda x, w: [F.rms_norm(x, (x.shape[-1],), w, EPS)], x, weight)


def stored(x):
    """fp64 as a program stores it in bf16: a GPU rounds, the interpreter cuts."""
    return x.bfloat16() if DEVICE == "cuda" else (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def test_what_rounding_takes_from_a_sum_goes_along():
    """Into the norm of it and into the next sum: forty of them are as good as one in fp32 that is rounded at the end."""
    *terms, weight = (random(300, 256, dtype=torch.bfloat16, seed=seed) for seed in range(42))
    stream = plain = terms[0].requires_grad_()
    for term in terms[1:]:
        before, stream, plain = stream, layer.added(term, stream), plain + term
        assert layer.LOW not in before.__dict__, "the graph keeps it otherwise"
    exact = sum(term.double() for term in terms)

    def off(found):
        return (found.double() - exact).abs().mean().item()

    once = off(stored(exact))
    assert off(stream) < 1.01 * once and off(plain) > 1.5 * once
    normed = layer.rms_norm(stream, weight[0], EPS)
    meant = F.rms_norm(exact, (256,), weight[0].double(), EPS)
    assert (normed != stored(meant)).double().mean().item() < 0.02
    assert (layer.rms_norm(stream.detach().clone(), weight[0], EPS) != stored(meant)).double().mean().item() > 0.1, "rounding shows"
    slope = random(300, 256, dtype=torch.bfloat16, seed=50)
    normed.backward(slope)
    of_norm = stream.detach().clone().requires_grad_()
    layer.rms_norm(of_norm, weight[0], EPS).backward(slope)
    assert (terms[0].grad - of_norm.grad).abs().max() < 0.02 * of_norm.grad.abs().max()


def test_sums_in_fp32_lose_nothing_that_goes_along():
    x, residual = random(5, 8), random(5, 8, seed=1)
    total = layer.added(x, residual)
    assert torch.equal(total, x + residual) and layer.LOW not in total.__dict__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 48), (3, 2 * 2500)])
def test_swiglu(shape, dtype):
    def reference(pair):
        gate, up = pair.chunk(2, -1)
        return [F.silu(gate) * up]

    compare(lambda pair: [layer.swiglu(pair)], reference, random(*shape, dtype=dtype))


def turned(x, cos, sin, interleaved, size):
    """x [T, heads, d], of which the first `size` channels rotate."""
    rotating, still = x[..., :size], x[..., size:]
    a, b = (rotating[..., ::2], rotating[..., 1::2]) if interleaved else rotating.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    out = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([out, still], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("groups", "shared", "size", "rotating"), [(2, 3, 16, 16), (3, 1, 8, 4), (1, 4, 128, 64)])
def test_heads(groups, shared, size, rotating, interleaved, normed, dtype):
    tokens, positions = 9, torch.tensor([0, 1, 2, 3, 0, 1, 0, 900, 4000]).to(DEVICE)
    frequency = 10000.0 ** -(torch.arange(0, rotating, 2) / rotating)
    angles = (torch.arange(4096)[:, None] * frequency).float().to(DEVICE)
    twice = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
    turn = layer.Turn(twice, positions, interleaved, mscale=1.2)
    mixed = random(tokens, groups * (shared + 2) * size, dtype=dtype)
    weights = [random(size, dtype=dtype, seed=n) + 1 for n in (1, 2)] if normed else []

    def ours(mixed, *weights):
        return layer.heads(mixed, weights or None, groups, size, turn, EPS)

    def reference(mixed, *weights):
        q, k, v = mixed.view(tokens, groups, shared + 2, size).split([shared, 1, 1], 2)
        q, k, v = q.flatten(1, 2), k[:, :, 0], v[:, :, 0]
        if weights:
            q, k = (F.rms_norm(x, (size,), w, EPS) for x, w in zip((q, k), weights, strict=True))
        cos, sin = (f(angles.double()[positions])[:, None] * 1.2 for f in (torch.cos, torch.sin))
        return *(turned(x, cos, sin, interleaved, rotating) for x in (q, k)), v

    compare(ours, reference, mixed, *weights)


def test_what_is_forgotten_is_made_again():
    x = random(6, 8)
    weight = random(4, 4, seed=1)
    kept, found = [], []

    def pack(saved):
        kept.append(saved.numel())
        return saved

    for forget in (False, True):
        pair, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        active = layer.made_by(partial(layer.swiglu, pair.detach()), layer.swiglu(pair))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            if forget:
                with layer.forgetting(active):
                    out = active @ w
            else:
                out = active @ w
        del active
        out.backward(torch.ones_like(out))
        found.append((pair.grad, w.grad))
    assert all(torch.equal(kept_one, made_again) for kept_one, made_again in zip(*found, strict=True))
    assert sorted(kept) == [16, 24], "the product saves its inputs, and none where the inner hooks take them"
