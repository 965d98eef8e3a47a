"""critic: what estimates the rewards to come, where the algorithm has one. What is not said here is as in trainer."""

from dataclasses import dataclass

from slime.config.fields import number


@dataclass
class CriticConfig:
    path: str | None = None
    """Hugging Face directory, or a name on the hub, of the model that it begins as, its head replaced; by default model.path."""
    lr: float = number(1e-5, low=0)
    """Peak learning rate; follows trainer.schedule, with trainer.min_lr in proportion."""
    value_clip: float | None = number(0.2, above=0)
    """A value counts up to this far from what it was before the batch; null: without bounds."""
    warmup_steps: int = number(0, low=0)
    """Updates in which the critic alone learns, before the policy begins to."""
