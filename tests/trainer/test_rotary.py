"""The trainer rotates by the very bits that transformers does."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.models.config_json import ConfigJson
from slime.models.registry import FAMILIES
from slime.models.rope import Rope
from slime.trainer.rotary import inverse_frequencies
from tests.models.real_configs import CONFIGS
from tests.models.test_real_configs import respelled, theirs
from tests.tiny import CLASSES

LINEAR = {"rope_type": "linear", "factor": 4.0}
OTHER_ENDS = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA, QWEN, GLM, AIR, V3 = (CONFIGS[name] for name in ("Llama-3.1-8B", "Qwen3-8B", "GLM-4-9B-0414", "GLM-4.5-Air", "DeepSeek-V3"))
EVEN = {"mscale": 1.0, "mscale_all_dim": 1.0}
CASES: dict[str, dict[str, Any]] = {
    **CONFIGS,  # of them llama3 of Llama-3.1 and yarn of DeepSeek-V2-Lite and V3; without scaling, the GLM that rotate in part
    "linear": LLAMA | {"rope_scaling": LINEAR},
    "linear-odd": LLAMA | {"rope_scaling": LINEAR | {"factor": 3}, "head_dim": 80},
    "linear-partial": AIR | {"rope_scaling": LINEAR},
    "linear-latent": V3 | {"rope_scaling": LINEAR},
    "llama3-other": LLAMA | {"rope_scaling": OTHER_ENDS | {"original_max_position_embeddings": 4096}, "rope_theta": 10000},
    "llama3-no-original": LLAMA | {"rope_scaling": OTHER_ENDS},
    "llama3-partial": GLM | {"rope_scaling": LLAMA["rope_scaling"]},
    "yarn": QWEN | {"rope_scaling": YARN},
    "yarn-untruncated": QWEN | {"rope_scaling": YARN | {"truncate": False}},
    "yarn-ends": QWEN | {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2.5}},
    "yarn-untruncated-ends": QWEN | {"rope_scaling": YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False}},
    "yarn-narrow": QWEN | {"rope_scaling": YARN | {"original_max_position_embeddings": 16}, "head_dim": 8},
    "yarn-mscale": QWEN | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "yarn-one-mscale": QWEN | {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn-given": QWEN | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn-partial": AIR | {"rope_scaling": YARN | {"attention_factor": 1.0}},
    "yarn-below-one": QWEN | {"rope_scaling": YARN | {"factor": 1.0}},
    "yarn-v3-untruncated": V3 | {"rope_scaling": YARN | EVEN | {"truncate": False, "factor": 40, "original_max_position_embeddings": 4096}},
}
CASES = {name: fields | {"num_hidden_layers": 1} for name, fields in CASES.items()}  # rotation is the same in all


def ours(folder: Path, fields: dict[str, Any]) -> Rope:
    (folder / "config.json").write_text(json.dumps(fields))
    return FAMILIES[fields["model_type"]].build(ConfigJson(folder), 1).rope


def rotary_module(fields: dict[str, Any]) -> Any:
    """What transformers' model rotates with."""
    kind, config = fields["model_type"], theirs(fields)  # before the model's module, which needs what this imports
    model = import_module(f"transformers.models.{kind}.modeling_{kind}")
    return getattr(model, f"{CLASSES[kind]}RotaryEmbedding")(config)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_frequencies_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    rope, reference = ours(tmp_path, fields), rotary_module(fields)
    frequencies = inverse_frequencies(rope)
    assert frequencies.dtype == reference.inv_freq.dtype == torch.float32
    assert torch.equal(frequencies, reference.inv_freq)
    assert rope.attention_factor == reference.attention_scaling
    again = ours(tmp_path, respelled(fields))
    assert torch.equal(inverse_frequencies(again), frequencies) and again.attention_factor == rope.attention_factor


def test_every_scaling_is_among_the_cases(tmp_path: Path) -> None:
    kinds = {(type(rope.scaling).__name__, rope.dim) for rope in (ours(tmp_path, fields) for fields in CASES.values())}
    assert {kind for kind, _ in kinds} == {"NoneType", "Linear", "Llama3", "Yarn"}
    assert ("Yarn", 64) in kinds and ("Llama3", 64) in kinds and ("Linear", 64) in kinds
