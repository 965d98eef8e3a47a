"""Server arguments in rollout.sglang that contradict slime's own knobs."""

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.roles import needed_roles

FROM_KNOBS = {  # SGLang's argument -> the knob that slime sets it from, see slime/engine/settings.py
    "model_path": "model.path",
    "dtype": "model.dtype",
    "tp_size": "rollout.tensor_parallel",
    "device": "cluster.device",
    "random_seed": "run.seed",
    "quantization": "rollout.quantization",
    "enable_return_routed_experts": "rollout.replay_experts",
    "enable_memory_saver": "cluster.share",
}


def check_serving(cfg: SlimeConfig) -> None:
    """Raise ConfigError for an argument that slime sets itself, and for a context that cannot hold the longest answer."""
    given = cfg.rollout.sglang
    for name, knob in FROM_KNOBS.items():
        if name in given:
            raise ConfigError(f"rollout.sglang.{name} is set by slime: use {knob}")
    context = given.get("context_length")
    if "rollout" not in needed_roles(cfg) or not isinstance(context, int):
        return
    for knob, tokens in longest_answers(cfg).items():
        if cfg.data.max_prompt_tokens + tokens > context:
            raise ConfigError(
                f"rollout.sglang.context_length={context} is below data.max_prompt_tokens={cfg.data.max_prompt_tokens} + {knob}={tokens}: "
                "raise it, or lower one of them"
            )


def longest_answers(cfg: SlimeConfig) -> dict[str, int]:
    """Tokens of the longest answer, by the knob that allows them."""
    answers = {"rollout.max_response_tokens": cfg.rollout.max_response_tokens}
    return answers | {f"data.eval.{name}.max_response_tokens": s.max_response_tokens or 0 for name, s in cfg.data.eval.items()}
