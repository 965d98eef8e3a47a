"""observe: what is shown, where, and what raises an alarm."""

import math
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
    mismatch_stop: float = number(0.5, low=0)
    """Stop the run when trainer and engine log-probs differ by more than this on average, warn from a tenth of it on; 0 does neither."""

    @property
    def mismatch_warn(self) -> float:
        """Above which mean difference of log-probs a run warns; infinite where it does not."""
        return self.mismatch_stop / 10 if self.mismatch_stop else math.inf
