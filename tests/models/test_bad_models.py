"""Models that cannot be trained: each is refused with a text that names the place and the mend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.models.hub import local_directory
from slime.models.registry import load_map
from tests.tiny import LLAMA3, make_tiny


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    return {family: make_tiny(root / family, family, layers=1) for family in ("qwen3", "llama")}


@pytest.fixture
def model(sound: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a sound model with changes to its config (None removes a field) and tensors (a function of the dict)."""

    def make(family: str = "qwen3", tensors: Callable[[dict], Any] | None = None, **fields: Any) -> Path:
        config = json.loads((sound[family] / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        weights = load_file(sound[family] / "model.safetensors")
        if tensors:
            tensors(weights)
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return make


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
    ("llama", {"rope_parameters": LLAMA3 | {"factor": "big"}}, "llama3 scaling needs a factor, a positive number; found 'big'"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config=.*quantized weights cannot be trained"),
    ("qwen3", {"hidden_act": "gelu"}, 'hidden_act="gelu": only the silu-gated MLP is mapped'),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: .*set it to 0"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters=.*type 'yarn' is not mapped to megatron-core"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor=1.0 built in, config.json says 2.0"),
    ("llama", {"rope_parameters": {**LLAMA3, "mscale": 1}}, r"unknown rotary parameter\(s\) mscale for type 'llama3'"),
    ("llama", {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "llama3 scaling needs a factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "only rotary embeddings over the whole head are mapped"),
    ("llama", {"rope_theta": 5.0}, "rope_theta=5.0: contradicts rope_parameters; keep one of them"),
    ("llama", {"rope_parameters": ..., "rope_theta": "big"}, "rope_theta='big': a positive number is needed"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling=.*contradicts rope_parameters"),
    ("llama", {"rope_parameters": 5}, "rope_parameters=5: an object of rotary parameters is needed"),
    ("qwen3", {"hidden_size": ...}, "config.json: the field hidden_size is missing"),
    ("qwen3", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: a positive whole number is needed"),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps=0: a positive number is needed"),
    ("qwen3", {"tie_word_embeddings": "no"}, 'tie_word_embeddings="no": true or false is needed'),
    ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide num_attention_heads=4"),
    (
        "qwen3",
        {"model_type": "gpt2"},
        r'model_type="gpt2": no family has this type \(known: llama, qwen3\); model.family names one by hand',
    ),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "architectures=.*model.family=qwen3 maps Qwen3ForCausalLM only"),
    ("qwen3", {"hidden_size": 32}, r"model.embed_tokens.weight has shape \[80, 64\], its config.json calls for \[80, 32\]"),
    ("qwen3", {"num_hidden_layers": 2}, r"lack model.layers.1.input_layernorm.weight, .* and 7 more, which its config.json calls for"),
]


@pytest.mark.parametrize(("family", "fields", "text"), CONFIGS, ids=[f"{f}-{'-'.join(c)}" for f, c, _ in CONFIGS])
def test_a_config_that_cannot_be_mapped(model: Callable[..., Path], family: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_map(model(family, **fields))


def test_tensors_that_do_not_fit(model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"its safetensors lack lm_head.weight, which its config.json calls for"):
        load_map(model(tensors=lambda t: t.pop("lm_head.weight")))
    with pytest.raises(ValueError, match=r"its safetensors hold model.norm.bias, for which the map of its family has no place"):
        load_map(model(tensors=lambda t: t.update({"model.norm.bias": torch.zeros(64)})))


def test_sizes_that_do_not_divide(model: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError, match=r"trainer.tensor_parallel=4 cannot split the 2 key/value heads of model.layers.0.self_attn.k_proj"
    ):
        load_map(model(), tp_size=4)


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


def test_a_family_that_is_not_there(model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"model.family=mamba: no such family; known are auto, llama, qwen3"):
        load_map(model(), family="mamba")


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


def test_configs_that_are_understood(model: Callable[..., Path]) -> None:
    """Older spellings, fields without effect, a family named by hand, and a spare output layer in a tied checkpoint."""
    old = load_map(
        model("llama", rope_parameters=..., rope_theta=500000.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    )
    assert (old.gpt["rotary_base"], old.gpt["rope_scaling_factor"]) == (500000.0, 8.0)
    assert load_map(model("llama", rope_parameters=..., head_dim=..., num_key_value_heads=2)).gpt["rotary_base"] == 10000.0
    assert load_map(model("qwen3", sliding_window=4096, max_window_layers=1, torch_dtype="bfloat16")).family == "qwen3"
    assert load_map(model("llama", model_type="mine", architectures=["MineForCausalLM"]), family="llama").family == "llama"
    assert "lm_head.weight" not in load_map(model("qwen3", tie_word_embeddings=True)).hf_shapes
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert load_map(model("llama", tensors=lambda t: t.update(inv_freq))).family == "llama"
