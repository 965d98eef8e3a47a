"""DeepSeek-V2 and V2-Lite: latent attention, a softmax router limited to groups or not, shared experts."""

from slime.models.config_json import ConfigJson
from slime.models.decoder import Family
from slime.models.parts.attention import Latent
from slime.models.parts.feed_forward import Experts, Groups, Softmax
from slime.models.parts.sparse_layers import after_first_dense


def groups(config: ConfigJson) -> Groups | None:
    """The groups that topk_method=group_limited_greedy chooses within, each scored by its best expert."""
    config.only("topk_method", ("greedy", "group_limited_greedy"), "only greedy and group_limited_greedy are mapped for this family")
    config.ignore("n_group", "topk_group")
    if config.raw("topk_method") != "group_limited_greedy":
        return None
    return Groups(config.integer("n_group"), config.integer("topk_group"), "max")


FAMILY = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    attention=Latent(),
    feed_forward=Experts(Softmax(norm="norm_topk_prob", scaled=True), after_first_dense, shared="n_shared_experts", groups=groups),
    only={
        "mlp_bias": ((False,), "biases of the MLP are not mapped"),
        "norm_topk_prob": ((False,), "only weights that are not normalised are mapped for this family"),
        "scoring_func": (("softmax",), "only softmax scores are mapped for this family"),
    },
    # Of pre-training, and the place of the code that came with the checkpoint.
    without_effect=("aux_loss_alpha", "seq_aux", "output_router_logits", "pretraining_tp", "ep_size", "auto_map"),
)
