"""Attention: grouped-query heads, or DeepSeek's latent ones. Parameters are named as megatron-core names them, without the layer."""

import math
from dataclasses import dataclass
from typing import Any

from slime.layout import QKV, Cols, Layout, Rows, Whole
from slime.models.config_json import ConfigJson
from slime.models.parts.flags import Flag, decide
from slime.models.parts.names import Names
from slime.models.rope import Rope, RopeForm, Yarn, read_rope, rope_field

WHOLE_HEAD = RopeForm()
DEEPSEEK = RopeForm(interleaved=True, nests_mscale=True)


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with the rotary embedding on each head or its first part."""

    head_dim: int | None = None  # where config.json names none; None: hidden_size / num_attention_heads
    qkv_bias: bool | Flag = False
    qk_norm: bool | Flag = False  # RMSNorm over each query and key head, before the rotary embedding
    rope: RopeForm = WHOLE_HEAD

    def read(self, config: ConfigJson) -> tuple[dict[str, Any], Rope]:
        """Values of megatron-core's TransformerConfig, and the rotary embedding."""
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        groups = config.integer("num_key_value_heads", heads)
        if heads % groups:
            raise config.error("num_key_value_heads", f"does not divide num_attention_heads={heads}")
        head_dim = config.integer("head_dim", self.head_dim or hidden // heads)
        rope = read_rope(config, head_dim, self.rope)
        values: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": head_dim,
            "add_qkv_bias": decide(self.qkv_bias, config),
            "qk_layernorm": decide(self.qk_norm, config),
            "rotary_interleaved": rope.interleaved,
        }
        if rope.attention_factor != 1:
            if rope.dim != head_dim:
                raise config.error(rope_field(config), "an attention factor on part of a head is not mapped; set attention_factor to 1")
            values["softmax_scale"] = rope.attention_factor**2 / math.sqrt(head_dim)  # cosines and sines meet twice in a product
        return values, rope

    def layouts(self, values: dict[str, Any], hf: Names) -> dict[str, Layout]:
        """The parameters of one layer's attention."""
        hidden, heads, groups, dim = (values[x] for x in ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"))
        rows = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
        q, k, v = (hf(f"self_attn.{x}_proj.weight", rows[x], hidden) for x in "qkv")
        layouts: dict[str, Layout] = {"self_attention.linear_qkv.weight": QKV(q, k, v, heads, groups, dim)}
        if values["add_qkv_bias"]:
            q, k, v = (hf(f"self_attn.{x}_proj.bias", rows[x]) for x in "qkv")
            layouts["self_attention.linear_qkv.bias"] = QKV(q, k, v, heads, groups, dim)
        if values["qk_layernorm"]:
            layouts["self_attention.q_layernorm.weight"] = Whole(hf("self_attn.q_norm.weight", dim))
            layouts["self_attention.k_layernorm.weight"] = Whole(hf("self_attn.k_norm.weight", dim))
        return layouts | {"self_attention.linear_proj.weight": Cols(hf("self_attn.o_proj.weight", hidden, heads * dim))}


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values, and with q_lora_rank queries too, come
    from a low-rank latent; a part of each head that is one for all heads rotates."""

    rope: RopeForm = DEEPSEEK

    def read(self, config: ConfigJson) -> tuple[dict[str, Any], Rope]:
        """Values of megatron-core's MLATransformerConfig, and the rotary embedding."""
        heads = config.integer("num_attention_heads")
        nope, rotated = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
        value_dim = config.integer("v_head_dim")
        config.only("num_key_value_heads", (heads,), f"latent attention has a key and a value for every head ({heads})")
        config.only("qk_head_dim", (nope + rotated,), "is not qk_nope_head_dim + qk_rope_head_dim")
        config.only("head_dim", (rotated, nope + rotated), "is neither qk_rope_head_dim nor the whole head")
        config.only("rope_interleave", (True,), "only interleaved rotary pairs are mapped for latent attention")
        config.only("attention_bias", (False,), "biases of the attention's projections are not mapped")
        rope = read_rope(config, rotated, self.rope)
        if rope.attention_factor != 1:
            raise config.error(rope_field(config), "mscale and mscale_all_dim must agree; cosines scaled by another factor are not mapped")
        factor = rope.scaling.factor if isinstance(rope.scaling, Yarn) and rope.mscale_all_dim else 1.0
        values = {
            "multi_latent_attention": True,
            "num_attention_heads": heads,
            "num_query_groups": heads,
            "kv_channels": value_dim,
            "q_lora_rank": config.integer("q_lora_rank") if config.raw("q_lora_rank") is not None else None,
            "kv_lora_rank": config.integer("kv_lora_rank"),
            "qk_head_dim": nope,
            "qk_pos_emb_head_dim": rotated,
            "v_head_dim": value_dim,
            "add_qkv_bias": False,
            "qk_layernorm": True,  # of the latents
            "rope_type": "rope",  # its frequencies are replaced by those of the model's `Rope`
            "rotary_scaling_factor": factor,  # with mscale_all_dim: the softmax scale
            "mscale": 1.0,
            "mscale_all_dim": rope.mscale_all_dim or 1.0,
        }
        return values, rope

    def layouts(self, values: dict[str, Any], hf: Names) -> dict[str, Layout]:
        """The parameters of one layer's attention."""
        hidden, heads, rank = values["hidden_size"], values["num_attention_heads"], values["kv_lora_rank"]
        q_rank, rotated, value_dim = values["q_lora_rank"], values["qk_pos_emb_head_dim"], values["v_head_dim"]
        q_rows = heads * (values["qk_head_dim"] + rotated)
        layouts: dict[str, Layout] = {}
        if q_rank is None:
            layouts["self_attention.linear_q_proj.weight"] = Rows(hf("self_attn.q_proj.weight", q_rows, hidden), heads)
        else:
            layouts["self_attention.linear_q_down_proj.weight"] = Whole(hf("self_attn.q_a_proj.weight", q_rank, hidden))
            layouts["self_attention.q_layernorm.weight"] = Whole(hf("self_attn.q_a_layernorm.weight", q_rank))
            layouts["self_attention.linear_q_up_proj.weight"] = Rows(hf("self_attn.q_b_proj.weight", q_rows, q_rank), heads)
        kv_rows = heads * (values["qk_head_dim"] + value_dim)
        return layouts | {
            "self_attention.linear_kv_down_proj.weight": Whole(hf("self_attn.kv_a_proj_with_mqa.weight", rank + rotated, hidden)),
            "self_attention.kv_layernorm.weight": Whole(hf("self_attn.kv_a_layernorm.weight", rank)),
            "self_attention.linear_kv_up_proj.weight": Rows(hf("self_attn.kv_b_proj.weight", kv_rows, rank), heads),
            "self_attention.linear_proj.weight": Cols(hf("self_attn.o_proj.weight", hidden, heads * value_dim)),
        }
