"""DeepSeek-V3, V3.1 and R1: latent attention, a sigmoid router with bias limited to groups, a shared expert, an MTP head."""

from slime.models.decoder import Family
from slime.models.parts.attention import Latent
from slime.models.parts.feed_forward import Experts, Sigmoid
from slime.models.parts.groups import by_best_two
from slime.models.parts.sparse_layers import after_first_dense

FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    attention=Latent(),
    feed_forward=Experts(Sigmoid(), after_first_dense, shared="n_shared_experts", groups=by_best_two),
    # Of pre-training, and the place of the code that came with the checkpoint.
    without_effect=("aux_loss_alpha", "seq_aux", "output_router_logits", "pretraining_tp", "ep_size", "auto_map"),
)
