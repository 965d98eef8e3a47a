"""The configs of real models are read whole, in the spelling of the hub and in that of transformers 5, and mean the same in both."""

import json
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from slime.models.config_json import ConfigJson
from slime.models.map import ModelMap
from slime.models.parts.feed_forward import Groups
from slime.models.registry import FAMILIES
from slime.models.rope import Llama3, Yarn
from tests.models.real_configs import CONFIGS
from tests.tiny import CLASSES, import_torchvision

each_model = pytest.mark.parametrize("name", CONFIGS)
# Billions of parameters as published, less those of MTP heads (the hub's pages count them: 110, 358, 31 for GLM's, 685 for DeepSeek-V3).
BILLIONS = {
    "Llama-3.1-8B": 8.030,
    "Qwen2.5-7B": 7.616,
    "Qwen3-8B": 8.191,
    "Qwen3-30B-A3B": 30.532,
    "glm-4-9b-chat-hf": 9.400,
    "GLM-4-9B-0414": 9.400,
    "GLM-4.5-Air": 106.85,
    "GLM-4.6": 352.8,
    "GLM-4.7-Flash": 29.9,
    "DeepSeek-V2-Lite": 15.706,
    "DeepSeek-V3": 671.03,
    "Mixtral-8x7B": 46.703,
}
# What megatron-core is told.
SAID: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {"num_moe_experts": 128, "moe_router_topk": 8, "moe_router_pre_softmax": False, "moe_layer_freq": [1] * 48},
    "GLM-4.5-Air": {"add_qkv_bias": True, "qk_layernorm": False, "moe_layer_freq": [0] + [1] * 45, "kv_channels": 128},
    "GLM-4.6": {"add_qkv_bias": True, "qk_layernorm": True, "moe_layer_freq": [0] * 3 + [1] * 89, "moe_router_topk_scaling_factor": 2.5},
    "GLM-4.7-Flash": {"v_head_dim": 256, "moe_layer_freq": [0] + [1] * 46, "moe_router_topk_scaling_factor": 1.8, "q_lora_rank": 768},
    "DeepSeek-V2-Lite": {"q_lora_rank": None, "moe_router_pre_softmax": True, "mscale_all_dim": 0.707, "rotary_scaling_factor": 40},
    "DeepSeek-V3": {
        "moe_layer_freq": [0] * 3 + [1] * 58,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 2048,
    },
}


def build(folder: Path, fields: dict[str, Any], tp_size: int = 1) -> ModelMap:
    (folder / "config.json").write_text(json.dumps(fields))
    return FAMILIES[fields["model_type"]].build(ConfigJson(folder), tp_size)


def theirs(fields: dict[str, Any]) -> Any:
    """The config as transformers reads it; it writes into the dicts that it is given."""
    import_torchvision()
    import transformers

    config_class = getattr(transformers, f"{CLASSES[fields['model_type']]}Config")
    known = {name: value for name, value in fields.items() if name not in ("model_type", "transformers_version", "auto_map")}
    return config_class(**deepcopy(known))


def respelled(fields: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers writes it."""
    return json.loads(theirs(fields).to_json_string())


def test_every_family_has_a_real_model() -> None:
    assert {fields["model_type"] for fields in CONFIGS.values()} == set(FAMILIES)


@each_model
def test_a_real_config_is_read_in_both_spellings(tmp_path: Path, name: str) -> None:
    """With few layers, which costs less."""
    short = CONFIGS[name] | {"num_hidden_layers": CONFIGS[name].get("first_k_dense_replace", 1) + 1}
    old, new = build(tmp_path, short, tp_size=2), respelled(short)
    assert "rope_parameters" in new and "rope_theta" not in new
    again = build(tmp_path, new, tp_size=2)
    assert replace(again, hf_config={}) == replace(old, hf_config={})


@pytest.mark.thorough
@each_model
def test_a_map_holds_the_parameters_that_the_model_has(tmp_path: Path, name: str) -> None:
    model = build(tmp_path, CONFIGS[name])
    assert sum(prod(shape) for shape in model.hf_shapes.values()) / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)
    expected = SAID.get(name, {})
    assert {key: value for key, value in model.transformer.items() if key in expected} == expected


@pytest.mark.parametrize("name", ["GLM-4.5-Air", "GLM-4.6", "GLM-4.7-Flash", "DeepSeek-V3"])
def test_the_mtp_head_lies_behind_the_last_layer(tmp_path: Path, name: str) -> None:
    short = CONFIGS[name] | {"num_hidden_layers": 4}
    assert build(tmp_path, short).kept == ("model.layers.4.*",)


def test_what_the_configs_say_of_rotation_and_groups(tmp_path: Path) -> None:
    models = {name: build(tmp_path, fields | {"num_hidden_layers": 1}) for name, fields in CONFIGS.items()}
    v3 = models["DeepSeek-V3"].rope
    assert v3.scaling == Yarn(40, 4096, 32, 1, True) and v3.attention_factor == 1.0 and v3.mscale_all_dim == 1.0
    assert models["Llama-3.1-8B"].rope.scaling == Llama3(8.0, 1.0, 4.0, 8192)
    assert {name: model.groups for name, model in models.items() if model.groups} == {"DeepSeek-V3": Groups(8, 4, "top2")}
    assert {name for name, model in models.items() if model.gpt["rotary_percent"] != 1} == {
        "glm-4-9b-chat-hf",
        "GLM-4-9B-0414",
        "GLM-4.5-Air",
        "GLM-4.6",
    }
    assert {name for name, model in models.items() if model.sandwich} == {"GLM-4-9B-0414"}
    interleaved = {"glm-4-9b-chat-hf", "GLM-4-9B-0414", "GLM-4.7-Flash", "DeepSeek-V2-Lite", "DeepSeek-V3"}
    assert {name for name, model in models.items() if model.rope.interleaved} == interleaved


def test_the_quantized_checkpoint_of_deepseek_v3_is_refused(tmp_path: Path) -> None:
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match=r"quantization_config=.*fp8.*quantized weights cannot be trained; use the model's unquantized"):
        build(tmp_path, CONFIGS["DeepSeek-V3"] | {"quantization_config": fp8})


def test_yarn_as_the_hub_advises(tmp_path: Path) -> None:
    """Qwen's model cards: longer texts by YaRN."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    model = build(tmp_path, CONFIGS["Qwen3-8B"] | {"rope_scaling": scaling, "max_position_embeddings": 131072})
    assert model.rope.scaling == Yarn(4.0, 32768, 32.0, 1.0, True) and model.rope.theta == 1000000
