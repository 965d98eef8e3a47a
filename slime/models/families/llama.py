"""Llama 2 and 3.x, dense: tied or untied embeddings; long context through llama3 rotary scaling."""

from slime.models.decoder import Family
from slime.models.parts.attention import GroupedQuery
from slime.models.parts.feed_forward import Gated

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    attention=GroupedQuery(),
    feed_forward=Gated(),
    only={
        "attention_bias": ((False,), "biases of the attention's projections are not mapped"),
        "mlp_bias": ((False,), "biases of the MLP are not mapped"),
    },
    without_effect=("pretraining_tp",),  # how the original training was sharded
)
