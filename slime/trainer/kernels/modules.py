"""Modules of a transformer layer that take our kernels where those run, and are megatron-core's own where they do not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.trainer.attention import PackedSequences
from slime.trainer.kernels import layer, on_triton


class TorchNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism: megatron-core sums its gradient over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm", f"normalization {config.normalization}"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if not on_triton(x.device):
            return super().forward(x)
        assert self.eps is not None
        out = layer.rms_norm(x, self.weight, self.eps)
        return layer.made_by(partial(layer.rms_norm, x.detach(), self.weight.detach(), self.eps), out)


class FusedAttention(SelfAttention):
    """Self-attention over packed rows, with one kernel between the projection of all heads and what attention takes."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self._takes(hidden_states, rotary_pos_emb):
            kwargs = {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params, **rest}
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        assert packed_seq_params is not None and packed_seq_params.positions is not None and rotary_pos_emb is not None
        with layer.forgetting(hidden_states):
            mixed, _ = self.linear_qkv(hidden_states)
        turn = layer.Turn(
            rotary_pos_emb[:, 0, 0],
            packed_seq_params.positions,
            self.config.rotary_interleaved,
            _yarn_get_concentration_factor_from_config(self.config),
        )
        norms = (self.q_layernorm.weight, self.k_layernorm.weight) if isinstance(self.q_layernorm, TorchNorm) else None
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query, key, value = layer.heads(mixed[:, 0], norms, groups, size, turn, self.config.layernorm_epsilon)
        attend = self._checkpointed_attention_forward if self.checkpoint_core_attention and self.training else self.core_attention
        out = attend(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params)
        return self.linear_proj(out[:, None])

    def _takes(self, hidden_states: Tensor, rotary_pos_emb: Tensor | None) -> bool:
        size = self.hidden_size_per_attention_head
        usual = rotary_pos_emb is not None and not self.config.no_rope_freq and not self.config.attention_output_gate
        return on_triton(hidden_states.device) and usual and size & (size - 1) == 0 and self.config.num_query_groups >= self.world_size


class FusedMLP(MLP):
    """A gated MLP with one kernel for its activation, which is computed again in the backward pass."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor | None]:
        if not on_triton(hidden_states.device):
            return super().forward(hidden_states, per_token_scale, **rest)
        with layer.forgetting(hidden_states):
            pair, bias = self.linear_fc1(hidden_states)
        assert bias is None and per_token_scale is None, "no family has a bias on the MLP"
        active = layer.made_by(partial(layer.swiglu, pair.detach()), layer.swiglu(pair))
        with layer.forgetting(active):
            return self.linear_fc2(active)


def add_residual(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """In place of megatron-core's bias-dropout-add, of which only the sum is left here."""

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        if on_triton(x.device) and bias is None and not dropout and x.dtype == residual.dtype:
            return layer.added(x, residual)
        return get_bias_dropout_add(training, fused)(x_with_bias, residual, dropout)

    return add


class NormedAttention(FusedAttention):
    """Attention with a norm on what it adds to the residual stream (GLM-4-0414)."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        added, bias = super().forward(*args, **kwargs)
        assert bias is None, "no family has a bias on the output projection"
        return self.post_layernorm(added), None


class NormedMLP(FusedMLP):
    """An MLP with a norm on what it adds to the residual stream (GLM-4-0414)."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        added, bias = super().forward(*args, **kwargs)
        assert bias is None, "no family has a bias on the MLP"
        return self.post_layernorm(added), None
