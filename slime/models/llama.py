"""Llama 2 and 3.x, dense, tied or untied embeddings; long context through llama3 rotary scaling."""

from slime.models.dense import DenseFamily

LLAMA = DenseFamily(
    name="llama",
    architecture="LlamaForCausalLM",
    qk_norm=False,
    head_dim=None,
    only={
        "attention_bias": ((False,), "biases of the attention's projections are not mapped"),
        "mlp_bias": ((False,), "biases of the MLP are not mapped"),
    },
    without_effect=("pretraining_tp",),  # how the original training was sharded
    spare_tensors=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
