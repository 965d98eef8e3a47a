"""Qwen3, dense: norms on query and key heads, tied or untied embeddings, a head size of its own."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Gated

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    attention=GroupedQuery(head_dim=128, qk_norm=True),
    feed_forward=Gated(),
    only={
        "attention_bias": ((False,), "biases of the attention's projections are not mapped"),
        "use_sliding_window": ((False,), "sliding-window attention is not mapped"),
    },
    without_effect=("sliding_window", "max_window_layers"),  # read only with use_sliding_window
)
