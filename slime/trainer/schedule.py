"""The learning rate of an optimizer step."""

import math

from slime.config import TrainerConfig
from slime.config.trainer import decay_length


def learning_rate(cfg: TrainerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps` in all.

    Linear warm-up to cfg.lr over cfg.warmup_steps (step 0 has lr / warmup_steps), then by cfg.schedule:

        constant   cfg.lr
        cosine     half a cosine from cfg.lr to cfg.min_lr over decay_steps (by default all that follow the warm-up), min_lr after
        wsd        cfg.lr, and over the last decay_steps (by default a tenth of all, at least two) linearly to cfg.min_lr
                   (warm-up, stable, decay; arXiv 2404.06395)

    A decay begins at cfg.lr and would reach min_lr one step after its last, so that no step is spent at a rate of 0.
    Raises ValueError for another schedule.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    if cfg.schedule == "cosine":
        done = min(1.0, (step - cfg.warmup_steps) / decay_length(cfg, steps))
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if cfg.schedule == "wsd":
        decay = decay_length(cfg, steps)
        done = min(1.0, max(0.0, (step - (steps - decay)) / decay))
        return cfg.lr + (cfg.min_lr - cfg.lr) * done
    raise ValueError(f"trainer.schedule={cfg.schedule!r}: choose constant, cosine or wsd")
