"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Gated

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    attention=GroupedQuery(qkv_bias=True),
    feed_forward=Gated(),
    only={"use_sliding_window": ((False,), "sliding-window attention is not mapped")},
    without_effect=("sliding_window", "max_window_layers", "use_mrope"),  # the first two are read with use_sliding_window only
)
