"""observe: what is shown, where, and what raises an alarm."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class ObserveConfig:
    wandb: str = choice("offline", "online", "off")
    """Weights & Biases; offline writes into the run's directory. WANDB_PROJECT names the project, else it is slime."""
    tensorboard: bool = False
    """Write TensorBoard events into the run's directory."""
    examples: int = number(8, low=0)
    """Samples a step that are kept for the report."""
    mismatch_warn: float = number(0.05, low=0)
    """Warn when trainer and engine log-probs differ by more than this on average (mismatch/logprob_abs_diff)."""
    mismatch_stop: float = number(0.5, low=0)
    """Stop the run when they differ by more than this; 0 never stops."""
