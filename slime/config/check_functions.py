"""Names of built-in functions, and import paths of a user's own: each is loaded once, before anything starts."""

import inspect
from collections.abc import Callable
from typing import Any

from slime.config import RolloutConfig, SlimeConfig
from slime.config.exits import ConfigError
from slime.config.imports import load_function
from slime.config.roles import needs_rollouts
from slime.config.tree import nearest

REWARDS = ("exact", "numeric", "math", "format")  # built in, in slime.rollout.rewards


def check_functions(cfg: SlimeConfig) -> None:
    """Raise ConfigError for a name that is neither built in nor an import path that loads."""
    needs_rollouts(cfg.algorithm)
    if cfg.reward.url is None:
        _named("reward.fn", cfg.reward.fn, REWARDS)
    for name, chosen in cfg.data.eval.items():
        if chosen.reward is not None:
            _named(f"data.eval.{name}.reward", chosen.reward, REWARDS)
    if cfg.rollout.filter is not None:
        _load("rollout.filter", cfg.rollout.filter)
    if cfg.rollout.generate != RolloutConfig.generate and not inspect.iscoroutinefunction(_load("rollout.generate", cfg.rollout.generate)):
        raise ConfigError(f"rollout.generate={cfg.rollout.generate}: not an async function; write async def fn(sample, client, cfg)")


def _named(knob: str, value: str, built_in: tuple[str, ...]) -> None:
    if ":" in value:
        _load(knob, value)
    elif value not in built_in:
        raise ConfigError(f"{knob}={value}: takes {', '.join(built_in)} or an import path pkg.mod:fn{nearest(value, built_in)}")


def _load(knob: str, path: str) -> Callable[..., Any]:
    try:
        return load_function(path, knob)
    except ValueError as error:
        raise ConfigError(str(error)) from error
