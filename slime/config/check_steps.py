"""Bounds on how far several optimizer steps on one batch may go: with one step, ratios are 1 and values are what they were."""

from slime.config import SlimeConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.check_inert import changed, setting
from slime.config.exits import ConfigError

OF_RATIOS = ("algorithm.clip_low", "algorithm.clip_high", "algorithm.clip_dual")
OF_VALUES = ("critic.value_clip",)


def check_steps(cfg: SlimeConfig) -> None:
    """Raises ConfigError for bounds that no optimizer step could reach. Algorithms of users read what they read."""
    trainer = cfg.trainer
    if trainer.updates_per_batch * trainer.epochs_per_batch > 1:
        return
    bounds = (*(OF_RATIOS if cfg.algorithm.name in ALGORITHMS else ()), *OF_VALUES)
    found = [setting(cfg, knob) for knob in bounds if changed(getattr(cfg, knob.partition(".")[0]), knob.partition(".")[2])]
    if found:
        verb, them = ("has", "it") if len(found) == 1 else ("have", "them")
        raise ConfigError(
            f"{', '.join(found)} {verb} no effect with trainer.updates_per_batch=1 and trainer.epochs_per_batch=1: a batch's only "
            f"optimizer step begins where ratios are 1 and values have not moved; raise one of the two, or remove {them}"
        )
