"""Engines that hold codes and scales: what rollout.quantization=fp8 needs. The rule is in slime/sync/fp8.py."""

from typing import Any

from slime.config import SlimeConfig
from slime.config.check_files import model_config
from slime.config.exits import ConfigError

BLOCK = 128  # rows and columns of a block
FP8_ON_GPU = "SGLang multiplies FP8 on a GPU; set rollout.quantization=none"


def check_fp8(cfg: SlimeConfig) -> None:
    """Raise ConfigError for what FP8 engines do not go with, and for a model that is no whole number of blocks."""
    if cfg.rollout.quantization != "fp8":
        return
    if cfg.model.dtype != "bf16":
        raise ConfigError(f"rollout.quantization=fp8 with model.dtype={cfg.model.dtype}: codes are made from bf16; set model.dtype=bf16")
    if cfg.run.only == "rollout":
        raise ConfigError(
            "rollout.quantization=fp8 with run.only=rollout, which publishes no weights: engines get their codes with the weights; "
            "set rollout.quantization=none"
        )
    if cfg.cluster.device == "cpu":
        raise ConfigError(f"rollout.quantization=fp8 with cluster.device=cpu: {FP8_ON_GPU}")
    if str(cfg.rollout.sglang.get("kv_cache_dtype")).startswith("fp8"):
        raise ConfigError(
            f"rollout.sglang.kv_cache_dtype={cfg.rollout.sglang['kv_cache_dtype']} with rollout.quantization=fp8: the model has no scales "
            "for its cache; remove one of them"
        )
    if "load_format" in cfg.rollout.sglang:
        raise ConfigError("rollout.sglang.load_format is set by slime with rollout.quantization=fp8: remove it")
    _blocks(cfg, model_config(cfg) or {})


def _blocks(cfg: SlimeConfig, config: dict[str, Any]) -> None:
    """SGLang divides matrices among ranks, and fuses them, by whole blocks."""
    tp = cfg.rollout.tensor_parallel
    heads, hidden = config.get("num_attention_heads", 1), config.get("hidden_size", BLOCK)
    head = config.get("head_dim") or hidden // heads
    sizes = {"hidden_size": (hidden, 1)}
    if "kv_lora_rank" not in config:
        groups = config.get("num_key_value_heads") or heads
        sizes |= {"num_attention_heads x head_dim": (heads * head, tp), "num_key_value_heads x head_dim": (groups * head, min(tp, groups))}
    elif config.get("q_lora_rank"):  # SGLang joins q_a_proj with kv_a_proj_with_mqa
        sizes |= {"q_lora_rank": (config["q_lora_rank"], 1)}
    among_experts = max(1, tp // int(cfg.rollout.sglang.get("ep_size") or 1))
    for name, ranks in (("intermediate_size", tp), ("moe_intermediate_size", among_experts)):
        sizes |= {name: (config[name], ranks)} if config.get(name) else {}
    for name, (size, ranks) in sizes.items():
        if size % (BLOCK * ranks):
            among = f" for each of rollout.tensor_parallel={ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"rollout.quantization=fp8: {name}={size} in {cfg.model.path}/config.json is no whole number of blocks of {BLOCK}{among}: "
                f"set rollout.quantization=none{', or lower rollout.tensor_parallel' if ranks > 1 and not size % BLOCK else ''}"
            )
