"""GLM-4.5, 4.5-Air, 4.6 and 4.7: half of each head rotates, a sigmoid router with bias, a shared expert, first layers dense, MTP."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Experts, Sigmoid
from slime.models.parts.flags import Flag
from slime.models.parts.groups import by_best_two
from slime.models.parts.sparse_layers import after_first_dense
from slime.models.rope import RopeForm

FAMILY = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention=GroupedQuery(qkv_bias=Flag("attention_bias", False), qk_norm=Flag("use_qk_norm", False), rope=RopeForm(partial=0.5)),
    feed_forward=Experts(Sigmoid(), after_first_dense, shared="n_shared_experts", groups=by_best_two),
    without_effect=("output_router_logits",),
    ties_served=False,
)
