"""Dense decoders of the Llama kind: RMSNorm, rotary embedding, grouped-query attention, gated MLP. A family is data for this file."""

from dataclasses import dataclass, field
from typing import Any

from slime.layout import GLU, QKV, Cols, HFTensor, Layout, Vocab, Whole
from slime.models.config_json import ConfigJson
from slime.models.map import ModelMap, padded_vocab
from slime.models.rope import read_rope

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NOT_QUANTIZED = "quantized weights cannot be trained; use the model's unquantized checkpoint"


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int  # key/value heads
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class DenseFamily:
    """What tells one dense family from another."""

    name: str  # model_type of config.json
    architecture: str
    qk_norm: bool  # RMSNorm over each query and key head, before the rotary embedding
    head_dim: int | None  # where config.json names none; None: hidden_size / num_attention_heads
    only: dict[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)  # field -> (values that the map expresses, why no other)
    without_effect: tuple[str, ...] = ()
    spare_tensors: tuple[str, ...] = ()  # patterns of checkpoint tensors that are derived from config.json

    def build(self, config: ConfigJson, tp_size: int) -> ModelMap:
        """The map of one model. Raises ValueError for a field that is unknown or has a value that megatron-core cannot express, and for a
        tp_size that does not divide the model."""
        config.only("quantization_config", (), NOT_QUANTIZED)
        config.only("compression_config", (), NOT_QUANTIZED)
        config.only("hidden_act", ("silu",), "only the silu-gated MLP is mapped")
        config.only("attention_dropout", (0, 0.0), "log-probs of trainer and engines must agree; set it to 0")
        for name, (allowed, why) in self.only.items():
            config.only(name, allowed, why)
        layer_types = config.raw("layer_types")
        if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}):
            raise config.error("layer_types", "only full attention is mapped, a list of full_attention")
        config.ignore("architectures", *self.without_effect)
        sizes = self._sizes(config)
        tied = config.flag("tie_word_embeddings", False)
        padded = padded_vocab(sizes.vocab, tp_size)
        gpt = {
            "vocab_size": padded,
            "max_sequence_length": config.integer("max_position_embeddings"),
            "share_embeddings_and_output_weights": tied,
            **read_rope(config),
        }
        transformer = self._transformer(sizes, config.number("rms_norm_eps"))
        config.finish(self.name)
        layouts = self._layouts(sizes, tied, padded)
        for layout in layouts.values():
            layout.local_shape(tp_size)
        shared = {OUTPUT: EMBEDDING} if tied else {}
        return ModelMap(self.name, config.values, transformer, gpt, sizes.vocab, layouts, shared)

    def _sizes(self, config: ConfigJson) -> Sizes:
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        sizes = Sizes(
            layers=config.integer("num_hidden_layers"),
            hidden=hidden,
            intermediate=config.integer("intermediate_size"),
            heads=heads,
            groups=config.integer("num_key_value_heads", heads),
            head_dim=config.integer("head_dim", self.head_dim or hidden // heads),
            vocab=config.integer("vocab_size"),
        )
        if sizes.heads % sizes.groups:
            raise config.error("num_key_value_heads", f"does not divide num_attention_heads={heads}")
        return sizes

    def _transformer(self, sizes: Sizes, eps: float) -> dict[str, Any]:
        return {
            "num_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "ffn_hidden_size": sizes.intermediate,
            "num_attention_heads": sizes.heads,
            "num_query_groups": sizes.groups,
            "kv_channels": sizes.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": eps,
            "qk_layernorm": self.qk_norm,
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    def _layouts(self, sizes: Sizes, tied: bool, padded: int) -> dict[str, Layout]:
        layouts: dict[str, Layout] = {EMBEDDING: Vocab(HFTensor("model.embed_tokens.weight", (sizes.vocab, sizes.hidden)), padded)}
        for number in range(sizes.layers):
            layer = self._layer(sizes, f"model.layers.{number}.")
            layouts |= {f"decoder.layers.{number}.{name}": layout for name, layout in layer.items()}
        layouts["decoder.final_layernorm.weight"] = Whole(HFTensor("model.norm.weight", (sizes.hidden,)))
        if not tied:
            layouts[OUTPUT] = Vocab(HFTensor("lm_head.weight", (sizes.vocab, sizes.hidden)), padded)
        return layouts

    def _layer(self, sizes: Sizes, prefix: str) -> dict[str, Layout]:
        """The parameters of one layer; `prefix` begins its HF names."""

        def hf(name: str, *shape: int) -> HFTensor:
            return HFTensor(f"{prefix}{name}.weight", shape)

        hidden, inner, dim = sizes.hidden, sizes.intermediate, sizes.head_dim
        q_rows, kv_rows = sizes.heads * dim, sizes.groups * dim
        q, k, v = (hf(f"self_attn.{x}_proj", rows, hidden) for x, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)))
        layer: dict[str, Layout] = {
            "input_layernorm.weight": Whole(hf("input_layernorm", hidden)),
            "self_attention.linear_qkv.weight": QKV(q, k, v, sizes.heads, sizes.groups, dim),
        }
        if self.qk_norm:
            layer["self_attention.q_layernorm.weight"] = Whole(hf("self_attn.q_norm", dim))
            layer["self_attention.k_layernorm.weight"] = Whole(hf("self_attn.k_norm", dim))
        return layer | {
            "self_attention.linear_proj.weight": Cols(hf("self_attn.o_proj", hidden, q_rows)),
            "pre_mlp_layernorm.weight": Whole(hf("post_attention_layernorm", hidden)),
            "mlp.linear_fc1.weight": GLU(hf("mlp.gate_proj", inner, hidden), hf("mlp.up_proj", inner, hidden)),
            "mlp.linear_fc2.weight": Cols(hf("mlp.down_proj", hidden, inner)),
        }
