"""Models that cannot be trained: each is refused with a text that names the place and the mend."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.models.hub import local_directory
from slime.models.registry import FAMILIES, load_map

Changed = Callable[..., Path]
KNOWN = ", ".join(sorted(FAMILIES))
# (family, fields of config.json, text); rotary fields are in test_rope.py, those of experts in test_bad_experts.py.
CONFIGS = [
    ("qwen3", {"altup_num_inputs": 4}, r"config.json: the map of model.family=qwen3 does not understand the field\(s\) altup_num_inputs"),
    ("llama", {"use_qk_norm": True, "zeta": 1}, r"model.family=llama does not understand the field\(s\) use_qk_norm, zeta"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true: biases of the attention's projections are not mapped"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true: biases of the MLP are not mapped"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=true: sliding-window attention is not mapped"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, r'layer_types=\["sliding_attention"\]: only full attention is mapped'),
    ("qwen3", {"layer_types": 5}, "layer_types=5: only full attention is mapped, a list of full_attention"),
    ("qwen3", {"layer_types": [["full_attention"]]}, "layer_types=.*: only full attention is mapped"),
    ("qwen3", {"model_type": ["qwen3"]}, r'model_type=\["qwen3"\]: no family has this type'),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config=.*quantized weights cannot be trained"),
    ("qwen3", {"hidden_act": "gelu"}, 'hidden_act="gelu": only the silu-gated MLP is mapped'),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: .*set it to 0"),
    ("qwen3", {"hidden_size": ...}, "config.json: the field hidden_size is missing"),
    ("qwen3", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: a positive whole number is needed"),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps=0: a positive number is needed"),
    ("qwen3", {"tie_word_embeddings": "no"}, 'tie_word_embeddings="no": true or false is needed'),
    ("llama", {"attention_bias": True}, "attention_bias=true: biases of the attention's projections are not mapped"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true: sliding-window attention is not mapped"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias=true: biases of the attention's projections are not mapped"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096: sliding-window attention is not mapped; set it to null"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=true: biases of the MLP are not mapped"),
    ("glm4", {"attention_bias": False}, r"hold model.layers.0.self_attn.k_proj.bias, .*, for which the map of its family has no place"),
    ("glm4_moe", {"use_qk_norm": "yes"}, 'use_qk_norm="yes": true or false is needed'),
    ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide num_attention_heads=8"),
    (
        "qwen3",
        {"model_type": "gpt2"},
        rf'model_type="gpt2": no family has this type \(known: {KNOWN}\); model.family names one by hand',
    ),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures=.*model.family=qwen3 maps Qwen3ForCausalLM only"),
    ("qwen3", {"hidden_size": 64}, r"model.embed_tokens.weight has shape \[77, 32\], its config.json calls for \[77, 64\]"),
    (
        "qwen3",
        {"num_hidden_layers": 3},
        r"lack model.layers.2.input_layernorm.weight, .* and 7 more, which its config.json calls for",
    ),
]


@pytest.mark.parametrize(("family", "fields", "text"), CONFIGS, ids=[f"{f}-{'-'.join(c)}" for f, c, _ in CONFIGS])
def test_a_config_that_cannot_be_mapped(changed: Changed, family: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_map(changed(family, **fields))


def test_sizes_that_do_not_divide(changed: Changed) -> None:
    text = r"trainer.tensor_parallel=3 cannot split the 4 key/value heads of model.layers.0.self_attn.k_proj"
    with pytest.raises(ValueError, match=text):
        load_map(changed(), tp_size=3)


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=/no/where: no such directory; give the directory of a Hugging Face model"):
        load_map("/no/where")
    with pytest.raises(ValueError, match=r"no config.json there; give the directory of a Hugging Face model"):
        load_map(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON: Expecting"):
        load_map(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object, found list"):
        load_map(tmp_path)


def test_a_family_that_is_not_there(changed: Changed) -> None:
    with pytest.raises(ValueError, match=rf"model.family=mamba: no such family; known are auto, {KNOWN}"):
        load_map(changed(), family="mamba")


def test_a_path_that_is_neither_directory_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_directory(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"model.path=a/b/c: no such directory, and not a hub id \(organisation/name\)"):
        local_directory("a/b/c")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"model.path=models/tiny: no such directory, and not a hub id"):  # the folder is here
        local_directory("models/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.path=nobody/nothing: no such directory, and not to be had from the hub"):
        local_directory("nobody/nothing", cache=tmp_path)


def test_configs_that_are_understood(changed: Changed) -> None:
    """Fields without effect, a family named by hand, and tensors that a checkpoint may hold besides."""
    assert load_map(changed("qwen3", sliding_window=4096, max_window_layers=1, torch_dtype="bfloat16")).family == "qwen3"
    assert load_map(changed("llama", model_type="mine", architectures=["MineForCausalLM"]), family="llama").family == "llama"
    assert "lm_head.weight" not in load_map(changed("qwen3", tie_word_embeddings=True)).hf_shapes
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert load_map(changed("llama", tensors=lambda t: t.update(inv_freq))).family == "llama"
