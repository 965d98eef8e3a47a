"""GLM-4-0414 (9B, 32B): GLM-4 with two further norms a layer, before the residual additions."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Gated
from slime.models.parts.flags import Flag
from slime.models.rope import RopeForm

FAMILY = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    attention=GroupedQuery(head_dim=128, qkv_bias=Flag("attention_bias", True), rope=RopeForm(interleaved=True, partial=0.5)),
    feed_forward=Gated(fused=True),
    sandwich=True,
)
