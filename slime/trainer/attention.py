"""Core attention over packed sequences (thd), for the CPU and CUDA, without Transformer Engine.

A micro-batch is one long row of tokens; `PackedSequences` says where each sequence begins. Sequences are packed in order of
length (`slime.trainer.packing`), so that a run of equally long ones is one batched call without padding.
"""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

MAX_FLASH_HEAD_SIZE = 256
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # since torch 2.10


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's record of a packed row, with what our attention needs worked out once for all layers.

    `cu_seqlens_q` stays on the host: rotary embeddings read it there.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)  # (length, sequences) of neighbours of one length
    cu_seqlens_device: Tensor | None = None  # int32 [sequences + 1], where the activations are

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "PackedSequences":
        """The packing of sequences of these lengths, in this order, that together cover the row."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths).cumsum(0)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            runs=[(length, len(list(run))) for length, run in groupby(lengths)],
            cu_seqlens_device=cu_seqlens.to(device),
        )


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence; megatron-core's `core_attention`, grouped-query heads included."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal), f"{attn_mask_type}: only causal attention is packed"
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv heads, d] -> [T, heads * d]."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None, "attention takes packed sequences only"
        dropout = self.dropout if self.training else 0.0
        if _flash_takes(query, dropout):
            out = _varlen(query, key, value, packed_seq_params, self.scale)
        else:
            out = _by_runs(query, key, value, packed_seq_params.runs, self.scale, dropout)
        return out.reshape(len(out), -1)


def _flash_takes(query: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length flash attention can compute this: CUDA, 16 bits, head size up to 256, no dropout."""
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= MAX_FLASH_HEAD_SIZE and dropout == 0.0
    return HAS_VARLEN and query.is_cuda and fits


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences, scale: float) -> Tensor:
    """One kernel for the whole row."""
    from torch.nn.attention.varlen import varlen_attn

    longest, cu_seqlens = packing.max_seqlen_q, packing.cu_seqlens_device
    assert cu_seqlens is not None
    grouped: dict[str, Any] = {}  # older torch takes grouped heads without being told
    if "enable_gqa" in signature(varlen_attn).parameters:
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    assert isinstance(out, Tensor), "no log-sum-exp was asked for"
    return out


def _by_runs(query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], scale: float, dropout: float) -> Tensor:
    """One batched call a run of equally long sequences."""
    sizes = [length * sequences for length, sequences in runs]
    outs = []
    for (length, sequences), q, k, v in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (x.reshape(sequences, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [sequences, heads, length, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]))
    return torch.cat(outs)
