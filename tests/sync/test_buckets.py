"""Weights on the wire."""

import base64
import pickle

import pytest
import torch

from slime.sync.buckets import serialise, together

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_survive(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    [(name, found)] = pickle.loads(base64.b64decode(serialise([("w", tensor)])))
    assert name == "w" and found.dtype == dtype and found.shape == (7, 5)
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_strange_values_survive() -> None:
    tensor = torch.tensor([0x7FC00001, -2147483648, 0x7F800000, 1], dtype=torch.int32).view(
        torch.float32
    )  # NaN payload, -0.0, inf, subnormal
    [(_, found)] = pickle.loads(base64.b64decode(serialise([("w", tensor)])))
    assert torch.equal(found.view(torch.int32), tensor.view(torch.int32))


def test_a_view_sends_its_own_bytes_only() -> None:
    whole = torch.randn(1000, 1000)
    for view in (whole[3], whole[:, 3], whole.t()[2:4]):
        wire = serialise([("w", torch.nn.Parameter(view))])
        assert len(wire) < 2 * view.numel() * 4 + 2000
        [(_, found)] = pickle.loads(base64.b64decode(wire))
        assert torch.equal(found, view) and not found.requires_grad


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_an_attention_comes_whole(size: int) -> None:
    layers = [f"model.layers.{i}.{name}" for i in range(12) for name in ("norm", "self_attn.a", "self_attn.b", "self_attn.c", "mlp.up")]
    names = ["model.embed_tokens", *layers, "model.norm"]
    tensors = [(name, torch.zeros(1)) for name in names]
    found = list(together(tensors[at : at + size] for at in range(0, len(tensors), size)))
    assert [name for bucket in found for name, _ in bucket] == names and all(found)
    for i in range(12):
        assert sum(any(f"layers.{i}.self_attn" in name for name, _ in bucket) for bucket in found) == 1
    assert max(map(len, found)) <= size + 3
