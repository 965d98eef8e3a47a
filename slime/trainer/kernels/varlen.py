"""Causal attention over a packed row by one kernel: torch's variable-length flash attention."""

from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_SIZE = 256
EXISTS = find_spec("torch.nn.attention.varlen") is not None  # since torch 2.10


def takes(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether it can compute this: CUDA, 16 bits, one head size of up to 256, no dropout."""
    sizes = query.shape[-1] == value.shape[-1] <= MAX_HEAD_SIZE
    fits = query.dtype in (torch.bfloat16, torch.float16) and sizes and dropout == 0.0
    return EXISTS and query.is_cuda and fits


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, longest: int, scale: float) -> Tensor:
    """query [T, heads, d], key and value [T, kv heads, d] -> [T, heads, d], each sequence by itself. cu_seqlens: int32 [sequences + 1], on
    the device; `longest` has so many tokens."""
    from torch.nn.attention.varlen import varlen_attn

    assert cu_seqlens is not None
    grouped: dict[str, Any] = {}  # older torch takes grouped heads without being told
    if "enable_gqa" in signature(varlen_attn).parameters:
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    causal = (-1, 0)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=causal, **grouped)
    assert isinstance(out, Tensor), "no log-sum-exp was asked for"
    return out
