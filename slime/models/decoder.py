"""A family of decoders: its attention, its feed-forward layers, and how config.json names what they share."""

from dataclasses import dataclass, field
from typing import Any

from slime.layout import HFTensor, Layout, Vocab, Whole
from slime.models.config_json import ConfigJson
from slime.models.map import ModelMap, padded_vocab
from slime.models.parts.attention import GroupedQuery, Latent
from slime.models.parts.feed_forward import Experts, Gated
from slime.models.parts.names import Names

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NOT_QUANTIZED = "quantized weights cannot be trained; use the model's unquantized checkpoint"
INV_FREQ = "model.layers.*.self_attn.rotary_emb.inv_freq"  # derived from config.json; old checkpoints hold it
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")
UNTIED = "tie_word_embeddings=true, and SGLang has an output layer of its own in this family, which nobody loads"


@dataclass(frozen=True)
class Family:
    """What tells one family from another; a file of `slime.models.families` is one of these."""

    name: str  # model_type of config.json
    architecture: str
    attention: GroupedQuery | Latent
    feed_forward: Gated | Experts
    sandwich: bool = False  # two further norms a layer, after attention and after the MLP, before the residual additions
    only: dict[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)  # field -> (values that the map expresses, why no other)
    without_effect: tuple[str, ...] = ()
    unserved: str = ""  # why SGLang cannot serve it, where that is so
    ties_served: bool = True  # whether SGLang ties the output layer to the embedding where config.json says so

    def build(self, config: ConfigJson, tp_size: int) -> ModelMap:
        """The map of one model. Raises ValueError for a field that is unknown or has a value that megatron-core cannot express, and for a
        tp_size that does not divide the model."""
        self._check(config)
        layers, hidden, vocab = (config.integer(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
        tied = config.flag("tie_word_embeddings", False)
        padded = padded_vocab(vocab, tp_size)
        attention, rope = self.attention.read(config)
        feed_forward, groups = self.feed_forward.read(config)
        values = {
            "num_layers": layers,
            "hidden_size": hidden,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.number("rms_norm_eps"),
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **attention,
            **feed_forward,
        }
        gpt = {
            "vocab_size": padded,
            "max_sequence_length": config.integer("max_position_embeddings"),
            "share_embeddings_and_output_weights": tied,
            "position_embedding_type": "rope",
            "rotary_percent": rope.dim / values["kv_channels"] if isinstance(self.attention, GroupedQuery) else 1.0,
        }
        kept = self._kept(config, layers)
        config.finish(self.name)
        layouts = self._layouts(values, vocab, padded, tied)
        for name, layout in layouts.items():
            layout.local_shape(1 if ".experts." in name else tp_size)
        return ModelMap(
            family=self.name,
            hf_config=config.values,
            transformer=values,
            gpt=gpt,
            vocab_size=vocab,
            layouts=layouts,
            shared={OUTPUT: EMBEDDING} if tied else {},
            rope=rope,
            groups=groups,
            sandwich=self.sandwich,
            unserved=self.unserved or (UNTIED if tied and not self.ties_served else ""),
            kept=kept,
            spare=(INV_FREQ, "lm_head.weight") if tied else (INV_FREQ,),
        )

    def _check(self, config: ConfigJson) -> None:
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

    def _kept(self, config: ConfigJson, layers: int) -> tuple[str, ...]:
        """Patterns of tensors that are carried along untrained: heads that predict further tokens lie behind the last layer."""
        heads = config.raw(config.spelled(*MTP_FIELDS)) or 0
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 0:
            raise config.error(config.spelled(*MTP_FIELDS), "a whole number is needed")
        return tuple(f"model.layers.{layers + i}.*" for i in range(heads))

    def _layouts(self, values: dict[str, Any], vocab: int, padded: int, tied: bool) -> dict[str, Layout]:
        hidden = values["hidden_size"]
        layouts: dict[str, Layout] = {EMBEDDING: Vocab(HFTensor("model.embed_tokens.weight", (vocab, hidden)), padded)}
        for number in range(values["num_layers"]):
            layer = self._layer(values, Names(f"model.layers.{number}."), number)
            layouts |= {f"decoder.layers.{number}.{name}": layout for name, layout in layer.items()}
        layouts["decoder.final_layernorm.weight"] = Whole(HFTensor("model.norm.weight", (hidden,)))
        if not tied:
            layouts[OUTPUT] = Vocab(HFTensor("lm_head.weight", (vocab, hidden)), padded)
        return layouts

    def _layer(self, values: dict[str, Any], hf: Names, number: int) -> dict[str, Layout]:
        """The parameters of one layer, in the order of its forward pass."""

        def norm(name: str) -> Layout:
            return Whole(hf(f"{name}.weight", values["hidden_size"]))

        layer: dict[str, Layout] = {"input_layernorm.weight": norm("input_layernorm")}
        layer |= self.attention.layouts(values, hf)
        if self.sandwich:
            layer["self_attention.post_layernorm.weight"] = norm("post_self_attn_layernorm")
        layer["pre_mlp_layernorm.weight"] = norm("post_attention_layernorm")
        layer |= self.feed_forward.layouts(values, hf, number)
        if self.sandwich:
            layer["mlp.post_layernorm.weight"] = norm("post_mlp_layernorm")
        return layer
