"""What holds of every family: it is found, a tiny model of it is made, what it does not know is refused by name, MTP heads ride along."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slime.models import families
from slime.models.registry import FAMILIES, REFUSED, load_map
from tests.tiny import CLASSES

Changed = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
MTP = ("glm4_moe", "glm4_moe_lite", "deepseek_v3")  # families whose checkpoints hold a head that predicts a further token
FRAME = ("embed_tokens.weight", "eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.head.weight", "shared_head.norm.weight")
each_family = pytest.mark.parametrize("family", FAMILIES)


def test_a_family_is_a_file_and_a_tiny_model() -> None:
    files = {file.stem for file in Path(families.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == set(FAMILIES) == set(CLASSES), "a family is a file in slime/models/families and a line in tests/tiny.py"
    assert all(family.name == name for name, family in FAMILIES.items())
    assert not set(FAMILIES) & set(REFUSED)


@each_family
def test_a_family_is_known_by_its_model_type(changed: Changed, family: str) -> None:
    path = changed(family)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family].architecture]
    assert load_map(path).family == load_map(path, family=family).family == family


@each_family
def test_an_unknown_field_is_named(changed: Changed, family: str) -> None:
    text = rf"config.json: the map of model.family={family} does not understand the field\(s\) altup_num_inputs, zeta; remove"
    with pytest.raises(ValueError, match=text):
        load_map(changed(family, zeta=0.5, altup_num_inputs=4))


@each_family
@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size"])
def test_a_field_that_is_missing_is_named(changed: Changed, family: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: the field {field} is missing"):
        load_map(changed(family, **{field: ...}))


@pytest.mark.thorough
@each_family
def test_every_tensor_is_needed(changed: Changed, family: str) -> None:
    """One of each kind: without it, the text names it."""
    model = load_map(changed(family))
    kinds = {name.replace(".experts.1.", ".experts.0."): name for name in model.hf_shapes if "layers.0." not in name}
    for name in list(kinds.values())[::3]:
        with pytest.raises(ValueError, match=f"its safetensors lack {name}, which its config.json calls for"):
            load_map(changed(family, tensors=lambda t, name=name: t.pop(name)))


@each_family
def test_a_tensor_without_a_place_is_named(changed: Changed, family: str) -> None:
    with pytest.raises(ValueError, match=r"its safetensors hold model.norm.bias, for which the map of its family has no place"):
        load_map(changed(family, tensors=lambda t: t.update({"model.norm.bias": torch.zeros(32)})))


@each_family
def test_a_shape_that_differs_is_named(changed: Changed, family: str) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(32, 5)

    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.o_proj.weight has shape \[32, 5\], its config.json calls for \[32, "):
        load_map(changed(family, tensors=widen))


@each_family
def test_a_file_that_is_cut_short_is_named(changed: Changed, family: str) -> None:
    path = changed(family, tensors=lambda t: None) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path}: not a whole safetensors file .*; download the model again"):
        load_map(path.parent)


@each_family
def test_quantized_weights_are_refused(changed: Changed, family: str) -> None:
    with pytest.raises(ValueError, match=r"quantization_config=.*quantized weights cannot be trained; use the model's unquantized"):
        load_map(changed(family, quantization_config={"quant_method": "fp8"}))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", r"linear attention \(gated delta net\)"),
        ("qwen3_5", r"linear attention \(gated delta net\)"),
        ("deepseek_v32", r"sparse attention \(the lightning indexer\)"),
        ("glm_moe_dsa", r"sparse attention \(the lightning indexer\)"),
        ("deepseek_v4", "compressed attention"),
        ("gpt_oss", "attention sinks"),
    ],
)
def test_families_that_cannot_be_are_refused_with_the_reason(changed: Changed, model_type: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf'model_type="{model_type}": megatron-core\'s layers cannot compute its {reason}; families that'):
        load_map(changed(model_type=model_type, architectures=["OtherForCausalLM"]))
    with pytest.raises(ValueError, match=rf"model.family={model_type}: no such family"):
        load_map(changed(), family=model_type)


def add_head(tensors: Tensors) -> None:
    """What lies behind the last layer on the hub: a whole layer, and how the next embedding comes in."""
    whole = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    tensors.update(whole | {f"model.layers.2.{name}": torch.zeros(3, 2) for name in FRAME})


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers"])
@pytest.mark.parametrize("family", MTP)
def test_mtp_heads_ride_along(changed: Changed, family: str, field: str) -> None:
    spellings = {"num_nextn_predict_layers": ..., "num_mtp_layers": ...}
    without = load_map(changed(family, **spellings))
    assert not without.kept and not without.kept_shapes
    model = load_map(changed(family, add_head, **(spellings | {field: 1})))
    assert model.kept == ("model.layers.2.*",) and model.hf_shapes == without.hf_shapes
    assert {f"model.layers.2.{name}": (3, 2) for name in FRAME}.items() <= model.kept_shapes.items()
    layer = {name: shape for name, shape in model.hf_shapes.items() if "layers.1." in name}
    assert {name.replace("layers.1.", "layers.2."): shape for name, shape in layer.items()}.items() <= model.kept_shapes.items()
    assert len(model.kept_shapes) == len(layer) + len(FRAME)


@pytest.mark.parametrize("family", MTP)
def test_a_config_may_name_heads_that_the_file_does_not_hold(changed: Changed, family: str) -> None:
    """transformers' save_pretrained leaves them out."""
    model = load_map(changed(family, num_nextn_predict_layers=1, num_mtp_layers=...))
    assert model.kept and not model.kept_shapes


@pytest.mark.parametrize("family", MTP)
def test_heads_that_the_config_does_not_name_are_refused(changed: Changed, family: str) -> None:
    fields = {"num_nextn_predict_layers": ..., "num_mtp_layers": ...}
    with pytest.raises(ValueError, match=r"its safetensors hold model.layers.2.*for which the map of its family has no place"):
        load_map(changed(family, add_head, **fields))
    with pytest.raises(ValueError, match=r"its safetensors hold model.layers.2.*for which the map of its family has no place"):
        load_map(changed(family, add_head, **(fields | {"num_nextn_predict_layers": 0})))
    with pytest.raises(ValueError, match=r"num_mtp_layers=2: contradicts num_nextn_predict_layers; keep one of them"):
        load_map(changed(family, num_nextn_predict_layers=1, num_mtp_layers=2))
    with pytest.raises(ValueError, match=r'num_nextn_predict_layers="one": a whole number is needed'):
        load_map(changed(family, num_nextn_predict_layers="one", num_mtp_layers=...))
