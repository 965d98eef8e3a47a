"""Experts and latent attention: what config.json may say of them, and what of it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.models.config_json import ConfigJson
from slime.models.map import ModelMap
from slime.models.parts.attention import Latent
from slime.models.parts.feed_forward import Experts, Groups, Sigmoid
from slime.models.registry import FAMILIES, load_map

Changed = Callable[..., Path]
SPARSE = [name for name, family in FAMILIES.items() if isinstance(family.feed_forward, Experts)]
BIASED = [name for name in SPARSE if isinstance(FAMILIES[name].feed_forward.router, Sigmoid)]  # type: ignore[union-attr]
LATENT = [name for name, family in FAMILIES.items() if isinstance(family.attention, Latent)]


def build(path: Path) -> ModelMap:
    """The map that config.json asks for, whatever the tensors are."""
    config = ConfigJson(path)
    return FAMILIES[config.values["model_type"]].build(config, 1)


def refused(path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(path)


@pytest.mark.parametrize("family", SPARSE)
def test_a_tensor_of_one_expert_is_missing(changed: Changed, family: str) -> None:
    experts = [name for name in load_map(changed(family)).hf_shapes if "layers.1." in name and ".experts.3." in name]
    assert len(experts) == 3
    for name in experts:
        with pytest.raises(ValueError, match=f"lack {name}, which"):
            load_map(changed(family, tensors=lambda t, name=name: t.pop(name)))


@pytest.mark.parametrize("family", BIASED)
def test_the_bias_of_a_router_is_missing(changed: Changed, family: str) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with pytest.raises(ValueError, match=f"lack {name}, which its config.json calls for"):
        load_map(changed(family, tensors=lambda t: t.pop(name)))


@pytest.mark.parametrize("family", SPARSE)
def test_more_experts_a_token_than_there_are(changed: Changed, family: str) -> None:
    refused(changed(family, num_experts_per_tok=9), "num_experts_per_tok=9: the model has [48] experts")
    refused(changed(family, num_experts_per_tok=0), "num_experts_per_tok=0: a positive whole number is needed")
    refused(changed(family, num_experts_per_tok=...), "the field num_experts_per_tok is missing")


@pytest.mark.parametrize("family", SPARSE)
def test_the_spellings_of_the_number_of_experts(changed: Changed, family: str) -> None:
    first, second = FAMILIES[family].feed_forward.count  # type: ignore[union-attr]
    count = build(changed(family)).transformer["num_moe_experts"]
    for here, absent in ((first, second), (second, first)):
        assert build(changed(family, **{here: count, absent: ...})).transformer["num_moe_experts"] == count
    refused(changed(family, **{first: count, second: count + 1}), f"{second}={count + 1}: contradicts {first}; keep one of them")
    refused(changed(family, **{first: ..., second: ...}), f"the field {first} is missing")


@pytest.mark.parametrize("family", [*BIASED, "deepseek_v2"])
@pytest.mark.parametrize(
    ("count", "chosen", "per_token"),
    [(3, 2, 2), (4, 5, 2), (4, 1, 4), (16, 8, 2)],  # groups unlike in size, more than there are, too few experts within, empty groups
)
def test_groups_that_cannot_be(changed: Changed, family: str, count: int, chosen: int, per_token: int) -> None:
    fields: dict[str, Any] = {"n_group": count, "topk_group": chosen, "num_experts_per_tok": per_token}
    text = f"n_group={count}: 8 experts, {per_token} a token, cannot be chosen within {chosen} of {count} groups"
    refused(changed(family, **fields), text)


@pytest.mark.parametrize("family", BIASED)
def test_groups_that_are_scored_by_two_experts_hold_two(changed: Changed, family: str) -> None:
    refused(changed(family, n_group=8, topk_group=4, num_experts_per_tok=2), "n_group=8: 8 experts, 2 a token, cannot")
    model = build(changed(family, n_group=4, topk_group=2, num_experts_per_tok=2))
    assert model.groups == Groups(4, 2, "top2")
    assert build(changed(family, n_group=2, topk_group=2, num_experts_per_tok=2)).groups is None  # all of them: no limit


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("field", ["n_group", "topk_group", "routed_scaling_factor"])
def test_fields_whose_defaults_differ_between_families_are_needed(changed: Changed, family: str, field: str) -> None:
    refused(changed(family, **{field: ...}), f"the field {field} is missing")


def test_the_groups_of_deepseek_v2(changed: Changed) -> None:
    assert build(changed("deepseek_v2")).groups == Groups(4, 2, "max")
    assert build(changed("deepseek_v2", topk_method="greedy")).groups is None
    assert build(changed("deepseek_v2", topk_method=..., n_group=None, topk_group=...)).groups is None
    refused(changed("deepseek_v2", n_group=None, topk_group=None), "the field n_group is missing")
    refused(changed("deepseek_v2", topk_method="noaux_tc"), 'topk_method="noaux_tc": only greedy and group_limited_greedy are mapped')


BIASED_ONLY = [
    ({"norm_topk_prob": False}, "norm_topk_prob=false: only normalised weights of sigmoid routers are mapped"),
    ({"scoring_func": "softmax"}, 'scoring_func="softmax": only sigmoid scores are mapped for this family'),
    ({"topk_method": "greedy"}, r'topk_method="greedy": only the choice by score and bias \(noaux_tc\) is mapped for this family'),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2: only experts in every layer after the first dense ones are mapped"),
]


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize(("fields", "text"), BIASED_ONLY)
def test_routers_that_are_not_mapped(changed: Changed, family: str, fields: dict[str, Any], text: str) -> None:
    refused(changed(family, **fields), text)


@pytest.mark.parametrize("family", BIASED)
def test_routers_that_are_spelled_out(changed: Changed, family: str) -> None:
    plain = build(changed(family))
    spelled = build(changed(family, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1))
    assert spelled.transformer == plain.transformer and spelled.transformer["moe_router_enable_expert_bias"] is True


@pytest.mark.parametrize("family", [*BIASED, "mixtral", "qwen3_moe"])
def test_the_normalised_weight_of_a_single_expert(changed: Changed, family: str) -> None:
    """megatron-core would leave a sigmoid's weight as it is, and refuse softmax in every rank."""
    refused(changed(family, num_experts_per_tok=1), "num_experts_per_tok=1: the normalised weight of one expert is always 1, which is not")


def test_a_single_expert_whose_weight_is_not_normalised(changed: Changed) -> None:
    assert build(changed("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)).transformer["moe_router_topk"] == 1
    assert build(changed("deepseek_v2", num_experts_per_tok=1)).transformer["moe_router_topk"] == 1


def test_the_routers_of_softmax(changed: Changed) -> None:
    refused(changed("deepseek_v2", norm_topk_prob=True), "norm_topk_prob=true: only weights that are not normalised are mapped")
    refused(changed("deepseek_v2", scoring_func="sigmoid"), 'scoring_func="sigmoid": only softmax scores are mapped for this family')
    refused(changed("mixtral", router_jitter_noise=0.1), "router_jitter_noise=0.1: noise on the router's input is not mapped")
    refused(changed("qwen3_moe", norm_topk_prob="no"), 'norm_topk_prob="no": true or false is needed')
    for family, fields, pre in (
        ("qwen3_moe", {"norm_topk_prob": True}, False),
        ("qwen3_moe", {"norm_topk_prob": False}, True),
        ("qwen3_moe", {"norm_topk_prob": ...}, True),
        ("mixtral", {}, False),
        ("deepseek_v2", {}, True),
    ):
        assert build(changed(family, **fields)).transformer["moe_router_pre_softmax"] is pre
    assert build(changed("deepseek_v2")).transformer["moe_router_topk_scaling_factor"] == 1.5
    assert "moe_router_topk_scaling_factor" not in build(changed("mixtral")).transformer


def sparse_layers(path: Path) -> list[int]:
    return build(path).transformer["moe_layer_freq"]


@pytest.mark.parametrize("family", [*BIASED, "deepseek_v2"])
def test_dense_first_layers(changed: Changed, family: str) -> None:
    four = {"num_hidden_layers": 4, "mlp_layer_types": ..., "num_nextn_predict_layers": ..., "num_mtp_layers": ...}
    for dense, expected in ((0, [1, 1, 1, 1]), (1, [0, 1, 1, 1]), (3, [0, 0, 0, 1]), (4, [0, 0, 0, 0]), (..., [1, 1, 1, 1])):
        assert sparse_layers(changed(family, **four, first_k_dense_replace=dense)) == expected
    refused(changed(family, **four, first_k_dense_replace=-1), "first_k_dense_replace=-1: a whole number is needed")
    for dense in (2, ...):
        listed = four | {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "first_k_dense_replace": dense}
        assert sparse_layers(changed(family, **listed)) == [0, 0, 1, 1]
    contradicting = listed | {"first_k_dense_replace": 3}
    refused(changed(family, **contradicting), "mlp_layer_types=.* contradicts first_k_dense_replace=3, which SGLang reads")
    listed["mlp_layer_types"] = ["dense", "sparse", "dense", "sparse"]
    refused(changed(family, **listed), "mlp_layer_types=.* only experts in every layer after the first dense ones are mapped")
    for wrong in (["dense", "sparse"], ["dense", "sparse", "dense", "wide"], "dense", [[], [], [], []]):
        refused(changed(family, **(four | {"mlp_layer_types": wrong})), "mlp_layer_types=.*: a list of 4 times dense or sparse is needed")
    assert sparse_layers(changed(family, **four, first_k_dense_replace=1, moe_layer_freq=[1, 1, 1, 1])) == [0, 1, 1, 1]


def test_experts_in_every_layer(changed: Changed) -> None:
    for absent in ({}, {"mlp_only_layers": [], "decoder_sparse_step": 1}, {"mlp_only_layers": ..., "decoder_sparse_step": ...}):
        assert sparse_layers(changed("qwen3_moe", **absent)) == [1, 1]
    refused(changed("qwen3_moe", mlp_only_layers=[0]), r"mlp_only_layers=\[0\]: SGLang serves experts in every layer")
    refused(changed("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step=2: SGLang serves experts in every layer")
    assert sparse_layers(changed("mixtral")) == [1, 1]


@pytest.mark.parametrize("family", LATENT)
def test_latent_attention(changed: Changed, family: str) -> None:
    refused(changed(family, num_key_value_heads=4), r"num_key_value_heads=4: latent attention has a key and a value for every head \(8\)")
    refused(changed(family, qk_head_dim=21), "qk_head_dim=21: is not qk_nope_head_dim . qk_rope_head_dim")
    refused(changed(family, head_dim=7), "head_dim=7: is neither qk_rope_head_dim nor the whole head")
    refused(changed(family, rope_interleave=False), "rope_interleave=false: only interleaved rotary pairs are mapped for latent attention")
    refused(changed(family, attention_bias=True), "attention_bias=true: biases of the attention's projections are not mapped")
    refused(changed(family, kv_lora_rank=...), "the field kv_lora_rank is missing")
    refused(changed(family, q_lora_rank=2.5), "q_lora_rank=2.5: a positive whole number is needed")


@pytest.mark.parametrize("family", LATENT)
def test_heads_of_latent_attention_stay_whole(changed: Changed, family: str) -> None:
    """16 ranks divide the 160 rows of 8 heads, but not the heads."""
    for rank, name in ((20, "q_b_proj"), (None, "q_proj")):
        path, text = changed(family, q_lora_rank=rank), rf"tensor_parallel=16 cannot split the 8 heads of model.layers.0.self_attn.{name}.w"
        with pytest.raises(ValueError, match=text):
            FAMILIES[family].build(ConfigJson(path), 16)


@pytest.mark.parametrize("family", LATENT)
def test_queries_without_a_latent(changed: Changed, family: str) -> None:
    def one_projection(tensors: dict[str, Any]) -> None:
        for layer in (0, 1):
            names = [f"model.layers.{layer}.self_attn.q_{part}.weight" for part in ("a_proj", "a_layernorm", "b_proj")]
            down, _, up = (tensors.pop(name) for name in names)
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = up @ down

    model = load_map(changed(family, one_projection, q_lora_rank=None))
    assert model.transformer["q_lora_rank"] is None
    assert model.local_shape("decoder.layers.1.self_attention.linear_q_proj.weight", 2) == (80, 32)
    with pytest.raises(ValueError, match=r"lack model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight, which"):
        load_map(changed(family, q_lora_rank=None))
