"""Knobs that would do nothing in a run that goes without rollouts.

One table: mode -> knobs without effect. A group's name stands for all its knobs. What describes something that recipes share (data.train,
cluster) is not refused, nor is a knob that has its default. run.only is a switch on a whole recipe, so what the other half of that recipe
says is left alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.roles import needs_rollouts

SERVING = tuple(
    f"rollout.{knob}"
    for knob in (
        *("engines", "tensor_parallel", "max_in_flight", "engine_python", "sglang", "replay_experts", "quantization"),
        *("start_timeout_s", "request_timeout_s", "health_timeout_s", "max_restarts"),
        *("external_urls", "external_key_env", "join"),
    )
)
GENERATING = tuple(f"rollout.{knob}" for knob in ("mode", "top_p", "stop", "generate", "filter", "select", "oversample"))
OF_BATCHES = ("rollout.mask_truncated", "rollout.dump")
EVALUATING = ("data.eval", "run.eval_every")
MISMATCH = ("observe.mismatch_stop",)  # compares a trainer with an engine

INERT = {
    "demonstrations": (
        *("rollout.temperature", "rollout.samples_per_prompt"),
        *(*GENERATING, *OF_BATCHES, *SERVING, *EVALUATING, *MISMATCH),
        *("reward", "sync"),
    ),
    "train": ("rollout.dump",),
}


def check_inert(cfg: SlimeConfig) -> None:
    """Raise ConfigError naming every knob that this recipe sets and that its mode leaves without effect."""
    for mode, because in _modes(cfg):
        found = [setting(cfg, knob) for name in INERT[mode] for knob in _knobs(cfg, name) if changed(*_at(cfg, knob))]
        if found:
            verb, them = ("has", "it") if len(found) == 1 else ("have", "them")
            raise ConfigError(f"{', '.join(found)} {verb} no effect with {because}: remove {them}")


def changed(group: Any, knob: str) -> bool:
    """Whether a knob differs from its default."""
    field = next(field for field in dataclasses.fields(group) if field.name == knob)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return getattr(group, knob) != default


def setting(cfg: SlimeConfig, knob: str) -> str:
    """knob=value, or the knob alone where the value is long."""
    value = getattr(*_at(cfg, knob))
    if isinstance(value, list | dict):
        return f"{knob} ({', '.join(map(str, value))})"
    return f"{knob}={value:g}" if isinstance(value, float) else f"{knob}={str(value).lower() if isinstance(value, bool) else value}"


def _modes(cfg: SlimeConfig) -> Iterator[tuple[str, str]]:
    """The modes of INERT that a recipe is in, and why."""
    if cfg.run.only == "train":
        yield "train", "run.only=train, which replays rollouts"
    if not needs_rollouts(cfg.algorithm):
        yield "demonstrations", f"algorithm.name={cfg.algorithm.name}, which learns from demonstrations"


def _at(cfg: SlimeConfig, knob: str) -> tuple[Any, str]:
    group, _, name = knob.partition(".")
    return getattr(cfg, group), name


def _knobs(cfg: SlimeConfig, name: str) -> list[str]:
    """A knob alone, or all of a group."""
    return [name] if "." in name else [f"{name}.{field.name}" for field in dataclasses.fields(getattr(cfg, name))]
