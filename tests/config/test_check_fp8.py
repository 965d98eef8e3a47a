"""Recipes with FP8 engines: what they need, each with its exact error text."""

# ruff: noqa: E501

import json
import re

import pytest

from slime.config.checks import check, check_device
from slime.config.exits import ConfigError, PreflightError
from tests.config.composing import composed
from tests.config.test_bad_recipes import GOOD

BAD = {
    "rollout.quantization=fp8 model.dtype=fp32": "rollout.quantization=fp8 with model.dtype=fp32: codes are made from bf16; set model.dtype=bf16",
    "rollout.quantization=fp8 run.only=rollout rollout.dump=true": "rollout.quantization=fp8 with run.only=rollout, which publishes no weights: "
    "engines get their codes with the weights; set rollout.quantization=none",
    "rollout.quantization=fp8 cluster.device=cpu": "rollout.quantization=fp8 with cluster.device=cpu: SGLang multiplies FP8 on a GPU; "
    "set rollout.quantization=none",
    "rollout.quantization=fp8 rollout.sglang.kv_cache_dtype=fp8_e5m2": "rollout.sglang.kv_cache_dtype=fp8_e5m2 with rollout.quantization=fp8: "
    "the model has no scales for its cache; remove one of them",
    "rollout.quantization=fp8 rollout.sglang.load_format=auto": "rollout.sglang.load_format is set by slime with rollout.quantization=fp8: remove it",
    "rollout.quantization=fp8": "rollout.quantization=fp8: hidden_size=64 in model/config.json is no whole number of blocks of 128: "
    "set rollout.quantization=none",
}


@pytest.mark.parametrize(("overrides", "text"), BAD.items())
def test_what_fp8_does_not_go_with(overrides: str, text: str, workdir) -> None:
    with pytest.raises(ConfigError) as raised:
        check(composed(*GOOD, *overrides.split()))
    assert str(raised.value) == text


def test_a_device_found_by_auto_is_checked_too() -> None:
    fp8 = composed(*GOOD)
    fp8.rollout.quantization = "fp8"
    check_device(fp8, "cuda")
    with pytest.raises(PreflightError) as raised:
        check_device(fp8, "cpu")
    assert str(raised.value) == (
        "rollout.quantization=fp8 with cluster.device=auto, which is cpu here: SGLang multiplies FP8 on a GPU; set rollout.quantization=none"
    )


@pytest.mark.parametrize(
    ("sizes", "overrides", "text"),
    [
        ({"hidden_size": 256, "head_dim": 128}, [], None),
        ({"hidden_size": 256, "head_dim": 128, "intermediate_size": 384}, [], None),
        ({"hidden_size": 256, "head_dim": 128, "intermediate_size": 300}, [], "intermediate_size=300"),
        ({"hidden_size": 256, "head_dim": 96}, [], "num_key_value_heads x head_dim=192"),
        ({"hidden_size": 256, "head_dim": 128, "moe_intermediate_size": 128}, ["rollout.sglang.ep_size=2"], None),
        ({"hidden_size": 256, "head_dim": 128, "moe_intermediate_size": 128}, [], "moe_intermediate_size=128"),
        ({"hidden_size": 256, "kv_lora_rank": 64, "q_lora_rank": 224}, [], "q_lora_rank=224"),
        ({"hidden_size": 256, "kv_lora_rank": 64, "q_lora_rank": 256}, [], None),
    ],
)
def test_fp8_needs_whole_blocks(sizes: dict[str, int], overrides: list[str], text: str | None, workdir) -> None:
    config = json.loads((workdir / "model" / "config.json").read_text()) | sizes
    (workdir / "model" / "config.json").write_text(json.dumps(config))
    two = ["rollout.tensor_parallel=2", "cluster.roles.rollout.devices=2"] if "moe_intermediate_size" in sizes else []
    given = [*GOOD, "rollout.quantization=fp8", *two, *overrides]
    if text is None:
        check(composed(*given))
        return
    words = f"rollout.quantization=fp8: {text} in model/config.json is no whole number of blocks of 128"
    with pytest.raises(ConfigError, match=re.escape(words)):
        check(composed(*given))
