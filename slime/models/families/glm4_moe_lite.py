"""GLM-4.7-Flash: DeepSeek-V3's latent attention and sigmoid router, dense first layers, an MTP head."""

from slime.models.decoder import Family
from slime.models.parts.attention import Latent
from slime.models.parts.feed_forward import Experts, Sigmoid
from slime.models.parts.groups import by_best_two
from slime.models.parts.sparse_layers import after_first_dense

FAMILY = Family(
    name="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    attention=Latent(),
    feed_forward=Experts(Sigmoid(), after_first_dense, shared="n_shared_experts", groups=by_best_two),
    without_effect=("output_router_logits", "pretraining_tp", "ep_size"),  # how the original was trained and served
    ties_served=False,
)
