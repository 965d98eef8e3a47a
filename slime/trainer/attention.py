"""Core attention over packed sequences (thd), for the CPU and CUDA, without Transformer Engine.

A micro-batch is one long row of tokens; `PackedSequences` says where each sequence begins. Sequences are packed in order of
length (`slime.trainer.packing`), so that a run of equally long ones is one batched call without padding.

With context parallelism a rank holds two chunks of every sequence, the r-th from the front and the r-th from the back, so that all ranks
have the same share of the causal triangle (`slime.trainer.packing`). Keys and values are gathered from all ranks, queries stay.
"""

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.trainer.kernels import varlen


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's record of a packed row, with what our attention needs worked out once for all layers.

    `cu_seqlens_q` stays on the host: rotary embeddings read it there.
    """

    runs: list[tuple[int, int]] = field(default_factory=list)  # (length, sequences) of neighbours of one length
    cu_seqlens_device: Tensor | None = None  # int32 [sequences + 1], where the activations are
    positions: Tensor | None = None  # int64 [tokens of this rank], each in its sequence
    experts: Tensor | None = None  # int64 [layers, tokens of this rank, k], what the engine chose; see slime.trainer.routing
    padding: Tensor | None = None  # bool [tokens of this rank], those that stand for no token; None: there are none

    @classmethod
    def of(
        cls,
        lengths: list[int],
        positions: Tensor,
        experts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> "PackedSequences":
        """The packing of sequences of these lengths, in this order, that together cover the row (of all context-parallel ranks);
        `positions` lie where the activations do."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths).cumsum(0)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            runs=[(length, len(list(run))) for length, run in groupby(lengths)],
            cu_seqlens_device=cu_seqlens.to(positions.device),
            positions=positions,
            experts=experts,
            padding=padding,
        )

    def experts_of(self, layer: int) -> Tensor | None:
        """int64 [tokens of this rank, k], the recorded experts of a layer (counted from 0)."""
        return None if self.experts is None else self.experts[layer]


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
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "megatron-core hands its groups to attention"
        self.cp = pg_collection.cp
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
        """query [T, heads, d], key [T, kv heads, d], value [T, kv heads, dv] -> [T, heads * dv]."""
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None, "attention takes packed sequences only"
        dropout = self.dropout if self.training else 0.0
        if self.cp.size() > 1:
            out = _by_chunks(query, key, value, packed_seq_params.runs, self.scale, dropout, self.cp)
        elif varlen.takes(query, value, dropout):
            cu_seqlens, longest = packed_seq_params.cu_seqlens_device, packed_seq_params.max_seqlen_q
            out = varlen.attend(query, key, value, cu_seqlens, longest, self.scale)
        else:
            out = _by_runs(query, key, value, packed_seq_params.runs, self.scale, dropout)
        return out.reshape(len(out), -1)


def _by_runs(query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], scale: float, dropout: float) -> Tensor:
    """One batched call a run of equally long sequences."""
    sizes = [length * sequences for length, sequences in runs]
    outs = []
    for (length, sequences), q, k, v in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (x.reshape(sequences, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [sequences, heads, length, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).reshape(-1, query.shape[1], value.shape[2]))
    return torch.cat(outs)


def _by_chunks(
    query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], scale: float, dropout: float, cp: dist.ProcessGroup
) -> Tensor:
    """Under context parallelism: two batched calls, one a chunk, for a run of equally long sequences."""
    ranks, rank = cp.size(), cp.rank()
    keys, values = (_GatherRanks.apply(x, cp) for x in (key, value))  # [ranks, T, kv heads, d]
    outs, start = [], 0
    for length, sequences in runs:
        chunk = length // (2 * ranks)
        end = start + sequences * 2 * chunk
        k, v = (_in_order(x[:, start:end], sequences, chunk).transpose(1, 2) for x in (keys, values))  # [sequences, heads, length, d]
        q = query[start:end].reshape(sequences, 2, chunk, *query.shape[1:]).transpose(2, 3)  # [sequences, 2, heads, chunk, d]
        halves = []
        for half, place in enumerate((rank, 2 * ranks - 1 - rank)):
            seen = (place + 1) * chunk
            mask = torch.ones(chunk, seen, dtype=torch.bool, device=q.device).tril(seen - chunk)
            out = F.scaled_dot_product_attention(
                q[:, half], k[:, :, :seen], v[:, :, :seen], mask, scale=scale, dropout_p=dropout, enable_gqa=q.shape[2] != k.shape[1]
            )
            halves.append(out.transpose(1, 2))
        outs.append(torch.stack(halves, 1).reshape(-1, query.shape[1], value.shape[2]))
        start = end
    return torch.cat(outs)


def _in_order(gathered: Tensor, sequences: int, chunk: int) -> Tensor:
    """[ranks, sequences * 2 * chunk, ...], a run as the ranks hold it -> [sequences, ranks * 2 * chunk, ...], in the order of the text."""
    halves = gathered.reshape(len(gathered), sequences, 2, chunk, *gathered.shape[2:])
    in_order = torch.cat([halves[:, :, 0], halves[:, :, 1].flip(0)])  # [2 * ranks, sequences, chunk, ...]
    return in_order.transpose(0, 1).reshape(sequences, -1, *gathered.shape[2:])


class _GatherRanks(torch.autograd.Function):
    """Every rank's tensor, stacked in the order of the ranks. Backward, each rank gets the sum of what all ranks found for its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        d_x = d_gathered.new_empty(d_gathered.shape[1:])
        dist.reduce_scatter_tensor(d_x, d_gathered.flatten(0, 1).contiguous(), group=ctx.group)
        return d_x, None
