"""Knobs of the algorithm that would do nothing, or contradict each other."""

import math
from dataclasses import fields
from typing import Any

from slime.config.algorithm import AlgorithmConfig
from slime.config.algorithms import ALGORITHMS, MAX_LOG_RATIO, REJECT_LEVELS
from slime.config.check_inert import changed
from slime.config.exits import ConfigError
from slime.config.tree import nearest

# Knobs that another one switches on: knob -> (the other, what it must not be)
SWITCHES = {
    **dict.fromkeys(("importance_low", "importance_high"), ("importance", "none")),
    **dict.fromkeys(("distill_coef", "distill_beta", "distill_top_k"), ("distill", "none")),
}


def check_algorithm(cfg: AlgorithmConfig) -> None:
    """Raises ConfigError for knobs that the algorithm does not read, that another knob leaves without effect, and for values that make no
    sense together. Algorithms of users read what they read."""
    if traits := ALGORITHMS.get(cfg.name):
        for field in fields(cfg):
            if changed(cfg, field.name) and field.name not in traits.reads:
                readers = ", ".join(name for name, other in ALGORITHMS.items() if field.name in other.reads)
                _refuse(
                    cfg, field.name, f"has no effect with algorithm.name={cfg.name}: remove it, or choose one that reads it ({readers})"
                )
    for knob, (switch, off) in SWITCHES.items():
        if changed(cfg, knob) and getattr(cfg, switch) == off:
            _refuse(cfg, knob, f"has no effect with algorithm.{switch}={off}: remove it, or set algorithm.{switch}")
    _check_kl(cfg)
    _check_distill(cfg)
    _check_importance(cfg)


def _check_kl(cfg: AlgorithmConfig) -> None:
    if changed(cfg, "reference_every") and not (cfg.kl_loss_coef or cfg.kl_reward_coef):
        _refuse(cfg, "reference_every", "has no effect without algorithm.kl_loss_coef or algorithm.kl_reward_coef: there is no reference")
    if changed(cfg, "kl_estimator") and not (cfg.kl_loss_coef or cfg.kl_reward_coef):
        _refuse(cfg, "kl_estimator", "has no effect without algorithm.kl_loss_coef or algorithm.kl_reward_coef")
    if cfg.kl_loss_coef and cfg.kl_reward_coef:
        _refuse(cfg, "kl_loss_coef", f"counts the KL twice beside algorithm.kl_reward_coef={cfg.kl_reward_coef:g}: set one of them to 0")
    if cfg.kl_loss_coef and cfg.kl_estimator == "k1":
        _refuse(cfg, "kl_estimator", "as a loss has a gradient of expectation 0: choose k2, k3 or unbiased")
    if cfg.kl_reward_coef and cfg.kl_estimator == "unbiased":
        _refuse(cfg, "kl_estimator", "is of a loss, algorithm.kl_loss_coef: choose k1, k2 or k3 for a KL in the reward")


def _check_distill(cfg: AlgorithmConfig) -> None:
    for knob in ("clip_low", "clip_high", "clip_dual", "importance", "importance_reject", "opsm_delta"):
        if cfg.name == "opd" and cfg.distill in ("topk", "full") and changed(cfg, knob):
            _refuse(cfg, knob, f"has no effect with algorithm.distill={cfg.distill}, whose loss has no policy gradient: remove it")
    if cfg.name == "opd" and cfg.distill == "none":
        _refuse(cfg, "distill", "leaves algorithm.name=opd nothing to learn: choose sampled, topk or full")
    if cfg.distill == "sampled" and changed(cfg, "distill_beta"):
        _refuse(
            cfg, "distill_beta", "has no effect with algorithm.distill=sampled, which is the reverse KL: remove it, or choose topk or full"
        )
    if changed(cfg, "distill_top_k") and cfg.distill != "topk":
        _refuse(cfg, "distill_top_k", "has no effect without algorithm.distill=topk")


def _check_importance(cfg: AlgorithmConfig) -> None:
    if cfg.importance_low > cfg.importance_high:
        _refuse(cfg, "importance_low", f"is above algorithm.importance_high={cfg.importance_high:g}: lower it")
    if cfg.importance_normalize and cfg.importance == "none" and not cfg.importance_reject:
        _refuse(
            cfg,
            "importance_normalize",
            "has no effect with algorithm.importance=none and no algorithm.importance_reject, where all weights are 1: remove it, or set "
            "one of them",
        )
    for level, bounds in cfg.importance_reject.items():
        _check_rejection(level, bounds)


def _check_rejection(level: str, bounds: list[Any]) -> None:
    """One level's [low, high], of ratios from e^-20 to e^20."""
    at = f"algorithm.importance_reject.{level}"
    if level not in REJECT_LEVELS:
        raise ConfigError(f"{at}: no such level: choose {', '.join(REJECT_LEVELS)}{nearest(level, REJECT_LEVELS)}")
    said = f"{at}=[{', '.join(map(_said, bounds))}]"
    if len(bounds) != 2 or not all(type(bound) in (int, float) for bound in bounds):
        raise ConfigError(
            f"{said}: must be two numbers, the lowest and the highest ratio that is kept; infinity is .inf in a file, inf in an override"
        )
    low, high = bounds
    if not (low >= 0 and high >= 0):  # nor NaN
        raise ConfigError(f"{said}: must be at least 0, as ratios are")
    if low > high:
        raise ConfigError(f"{said}: the first is above the second: lower it")
    least, most = math.exp(-MAX_LOG_RATIO), math.exp(MAX_LOG_RATIO)
    if low <= least and high >= most:
        raise ConfigError(f"{said} has no effect, as it keeps every ratio from {least:.1g} to {most:.1g}: remove it, or narrow it")
    if high < least or low > most:
        raise ConfigError(f"{said} would reject every token, as ratios lie from {least:.1g} to {most:.1g}: widen it")


def _refuse(cfg: AlgorithmConfig, knob: str, why: str) -> None:
    raise ConfigError(f"algorithm.{knob}={_said(getattr(cfg, knob))} {why}")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
