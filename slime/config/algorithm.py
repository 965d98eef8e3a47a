"""algorithm: the tensor math of the loss."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class AlgorithmConfig:
    name: str = "grpo"
    """grpo, sft, or pkg.mod:fn that builds a slime.algorithms.Algorithm of your own."""
    normalize_std: bool = True
    """grpo: divide group-centred rewards by the group's standard deviation (Dr.GRPO: false)."""
    clip_low: float = number(0.2, low=0, high=1)
    """grpo: lower clip of the ratio at 1 - clip_low."""
    clip_high: float | None = None
    """grpo: upper clip of the ratio at 1 + clip_high (DAPO's clip-higher); by default clip_low."""
    aggregation: str = choice("token", "sequence", "constant")
    """Mean over tokens, mean of sequence means, or sum over a constant length (Dr.GRPO); always over the whole update."""
    entropy_coef: float = number(0.0, low=0)
    """grpo: weight of the entropy bonus."""
