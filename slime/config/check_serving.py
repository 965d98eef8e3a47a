"""Server arguments in rollout.sglang that contradict slime's own knobs."""

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.roles import needed_roles

FP8_ON_GPU = "SGLang multiplies FP8 on a GPU; set rollout.quantization=none"
FROM_KNOBS = {  # SGLang's argument -> the knob that slime sets it from, see slime/engine/settings.py
    "model_path": "model.path",
    "dtype": "model.dtype",
    "tp_size": "rollout.tensor_parallel",
    "device": "cluster.device",
    "random_seed": "run.seed",
    "quantization": "rollout.quantization",
    "enable_return_routed_experts": "rollout.replay_experts",
}


def check_serving(cfg: SlimeConfig) -> None:
    """Raise ConfigError for an argument that slime sets itself, and for a context that cannot hold the longest answer."""
    given = cfg.rollout.sglang
    for name, knob in FROM_KNOBS.items():
        if name in given:
            raise ConfigError(f"rollout.sglang.{name} is set by slime: use {knob}")
    if cfg.rollout.quantization == "fp8":
        _fp8(cfg)
    context = given.get("context_length")
    if "rollout" not in needed_roles(cfg) or not isinstance(context, int):
        return
    for knob, tokens in longest_answers(cfg).items():
        if cfg.data.max_prompt_tokens + tokens > context:
            raise ConfigError(
                f"rollout.sglang.context_length={context} is below data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {knob}={tokens}: "
                "raise it, or lower one of them"
            )


def _fp8(cfg: SlimeConfig) -> None:
    """What FP8 engines need; what the model's sizes must divide by is in check_files."""
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


def longest_answers(cfg: SlimeConfig) -> dict[str, int]:
    """Tokens of the longest answer, by the knob that allows them."""
    answers = {"rollout.max_response_tokens": cfg.rollout.max_response_tokens}
    return answers | {f"data.eval.{name}.max_response_tokens": s.max_response_tokens or 0 for name, s in cfg.data.eval.items()}
