"""Qwen3, dense: norms on query and key heads, tied or untied embeddings, head_dim of its own."""

from slime.models.dense import DenseFamily

QWEN3 = DenseFamily(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    head_dim=128,
    only={
        "attention_bias": ((False,), "biases of the attention's projections are not mapped"),
        "use_sliding_window": ((False,), "sliding-window attention is not mapped"),
    },
    without_effect=("sliding_window", "max_window_layers"),  # read only with use_sliding_window
)
