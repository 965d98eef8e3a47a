"""Mixtral 8x7B and 8x22B: experts in every layer, weights normalised over the chosen ones, no shared experts."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Experts, Softmax
from slime.models.parts.sparse_layers import everywhere
from slime.models.rope import RopeForm

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    attention=GroupedQuery(rope=RopeForm(theta=1e6)),
    feed_forward=Experts(
        Softmax(),
        everywhere,
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        mlp="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    only={
        "sliding_window": ((), "sliding-window attention is not mapped; set it to null"),
        "router_jitter_noise": ((0, 0.0), "noise on the router's input is not mapped; set it to 0"),
    },
    without_effect=("router_aux_loss_coef", "output_router_logits"),  # of pre-training
    ties_served=False,
)
