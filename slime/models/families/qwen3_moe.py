"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, a softmax router, no shared experts."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Experts, Softmax
from slime.models.parts.sparse_layers import everywhere

DENSE_LAYERS = "SGLang serves experts in every layer, with weights that no one has loaded where a layer has none"

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    attention=GroupedQuery(qk_norm=True),
    feed_forward=Experts(Softmax(norm="norm_topk_prob"), everywhere, count=("num_experts", "num_local_experts")),
    only={
        "attention_bias": ((False,), "biases of the attention's projections are not mapped"),
        "use_sliding_window": ((False,), "sliding-window attention is not mapped"),
        "mlp_only_layers": (([],), DENSE_LAYERS),
        "decoder_sparse_step": ((1,), DENSE_LAYERS),
    },
    without_effect=("sliding_window", "max_window_layers", "router_aux_loss_coef", "output_router_logits"),  # of pre-training
    ties_served=False,
)
