"""Names of built-in functions, and import paths of a user's own: each is loaded once, before anything starts."""

from collections.abc import Callable
from typing import Any

from slime.config import RolloutConfig, SlimeConfig
from slime.config.check_signatures import FILTER, GENERATE, always_true, check_call, check_reward, is_async
from slime.config.exits import ConfigError
from slime.config.imports import load_function
from slime.config.roles import needs_rollouts
from slime.config.tree import nearest

REWARDS = ("exact", "numeric", "math", "format")  # built in, in slime.rollout.rewards


def check_functions(cfg: SlimeConfig) -> None:
    """Raise ConfigError for a name that is neither built in nor an import path that loads."""
    needs_rollouts(cfg.algorithm)
    if cfg.reward.url is None:
        _reward("reward.fn", cfg.reward.fn, cfg.reward.signature)
    for name, chosen in cfg.data.eval.items():
        if chosen.reward is not None:
            _reward(f"data.eval.{name}.reward", chosen.reward, cfg.reward.signature)
    if cfg.rollout.filter is not None:
        _filter(cfg.rollout.filter)
    if cfg.rollout.generate != RolloutConfig.generate:
        _generate(cfg.rollout.generate)


def _reward(knob: str, value: str, signature: str) -> None:
    if ":" in value:
        check_reward(f"{knob}={value}", _load(knob, value), signature)
    elif value not in REWARDS:
        raise ConfigError(f"{knob}={value}: takes {', '.join(REWARDS)} or an import path pkg.mod:fn{nearest(value, REWARDS)}")


def _filter(path: str) -> None:
    fn, named = _load("rollout.filter", path), f"rollout.filter={path}"
    if returned := always_true(fn):
        raise ConfigError(
            f"{named}: it returns {returned}, which is always true, so every group would be kept; write def fn(group) -> bool"
        )
    check_call(named, fn, FILTER)


def _generate(path: str) -> None:
    fn, named = _load("rollout.generate", path), f"rollout.generate={path}"
    if not is_async(fn):
        raise ConfigError(f"{named}: not an async function; write async def fn(sample, client, cfg)")
    check_call(named, fn, GENERATE)


def _load(knob: str, path: str) -> Callable[..., Any]:
    try:
        return load_function(path, knob)
    except ValueError as error:
        raise ConfigError(str(error)) from error
