"""Knobs of the algorithm that would do nothing, or contradict each other."""

from dataclasses import fields
from typing import Any

from slime.config.algorithm import AlgorithmConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.check_inert import changed
from slime.config.exits import ConfigError

# Knobs that another one switches on: knob -> (the other, what it must not be)
SWITCHES = {
    **dict.fromkeys(("importance_bound", "importance_low", "importance_high"), ("importance", "none")),
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
    if cfg.importance_low > cfg.importance_high:
        _refuse(cfg, "importance_low", f"is above algorithm.importance_high={cfg.importance_high:g}: lower it")


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
    for knob in ("clip_low", "clip_high", "clip_dual", "importance"):
        if cfg.name == "opd" and cfg.distill in ("topk", "full") and changed(cfg, knob):
            _refuse(cfg, knob, f"has no effect with algorithm.distill={cfg.distill}, whose loss has no ratio: remove it")
    if cfg.name == "opd" and cfg.distill == "none":
        _refuse(cfg, "distill", "leaves algorithm.name=opd nothing to learn: choose sampled, topk or full")
    if cfg.distill == "sampled" and changed(cfg, "distill_beta"):
        _refuse(
            cfg, "distill_beta", "has no effect with algorithm.distill=sampled, which is the reverse KL: remove it, or choose topk or full"
        )
    if changed(cfg, "distill_top_k") and cfg.distill != "topk":
        _refuse(cfg, "distill_top_k", "has no effect without algorithm.distill=topk")


def _refuse(cfg: AlgorithmConfig, knob: str, why: str) -> None:
    raise ConfigError(f"algorithm.{knob}={_said(getattr(cfg, knob))} {why}")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
