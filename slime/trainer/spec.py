"""Which modules a transformer layer is built from: megatron-core's own, without Transformer Engine, with our norm and attention."""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.trainer.attention import PackedAttention
from slime.trainer.kernels.modules import FusedAttention, FusedMLP, NormedAttention, NormedMLP, TorchNorm, add_residual
from slime.trainer.routing import ExpertLayer


def decoder_spec(config: TransformerConfig, sandwich: bool, virtual_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage; `sandwich` adds norms after attention and MLP."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization, vp_stage=virtual_stage)
    block.layer_specs = [_ours(copy.deepcopy(layer), sandwich) for layer in block.layer_specs]
    block.layer_norm = TorchNorm
    return block


def _ours(layer: ModuleSpec, sandwich: bool) -> ModuleSpec:
    modules = layer.submodules
    modules.input_layernorm = TorchNorm
    modules.pre_mlp_layernorm = TorchNorm
    modules.self_attn_bda = modules.mlp_bda = add_residual
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if modules.mlp.module is MoELayer:
        layer.module = ExpertLayer
    if modules.self_attention.module is SelfAttention:
        modules.self_attention.module = FusedAttention
    if modules.mlp.module is MLP:
        modules.mlp.module = FusedMLP
    if sandwich:
        modules.self_attention.module, modules.mlp.module = NormedAttention, NormedMLP
    if isinstance(attention, MLASelfAttentionSubmodules):
        attention.q_layernorm = attention.kv_layernorm = TorchNorm
        # megatron-core's own splits these over the tensor-parallel ranks and loses a part of their gradient. Replicated, they need the
        # activations to be split along the sequence.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    elif attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return layer
