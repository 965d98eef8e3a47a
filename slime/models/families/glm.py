"""GLM-4 9B of 2024 (glm-4-9b-chat-hf): biases on query, key and value, half of each head rotates, gate and up in one tensor."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Gated
from slime.models.parts.flags import Flag
from slime.models.rope import RopeForm

FAMILY = Family(
    name="glm",
    architecture="GlmForCausalLM",
    attention=GroupedQuery(head_dim=128, qkv_bias=Flag("attention_bias", True), rope=RopeForm(interleaved=True, partial=0.5)),
    feed_forward=Gated(fused=True),
    unserved="SGLang has no GlmForCausalLM, and its fallback through transformers does not take it",
)
