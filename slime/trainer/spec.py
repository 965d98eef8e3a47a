"""Which modules a transformer layer is built from: megatron-core's own, without Transformer Engine, with our norm and attention."""

import copy

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.trainer.attention import PackedAttention


class TorchNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism: megatron-core sums its gradient over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        assert config.normalization == "RMSNorm", f"normalization {config.normalization}"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def decoder_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    block.layer_specs = [_ours(copy.deepcopy(layer)) for layer in block.layer_specs]
    block.layer_norm = TorchNorm
    return block


def _ours(layer: ModuleSpec) -> ModuleSpec:
    modules = layer.submodules
    modules.input_layernorm = TorchNorm
    modules.pre_mlp_layernorm = TorchNorm
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return layer
