"""trainer: how a batch becomes an update."""

from dataclasses import dataclass, field
from typing import Any

from slime.config.fields import choice, number


@dataclass
class TrainerConfig:
    lr: float = number(1e-6, low=0)
    """Peak learning rate of Adam."""
    schedule: str = choice("constant", "cosine", "wsd")
    """Learning rate after warm-up: constant, cosine to min_lr, or constant with a final decay (warm-up, stable, decay)."""
    warmup_steps: int = number(0, low=0)
    """Optimizer steps of linear warm-up."""
    decay_steps: int | None = None
    """Optimizer steps of the final decay for wsd (by default a tenth of all), or until min_lr for cosine (all)."""
    min_lr: float = number(0.0, low=0)
    """Where cosine and wsd end."""
    weight_decay: float = number(0.0, low=0)
    """Decoupled weight decay; not applied to norms and biases."""
    beta1: float = number(0.9, low=0, below=1)
    """Adam's decay of the gradient mean."""
    beta2: float = number(0.98, low=0, below=1)
    """Adam's decay of the squared-gradient mean."""
    eps: float = number(1e-8, above=0)
    """Adam's epsilon."""
    clip_grad: float = number(1.0, low=0)
    """Largest global gradient norm; 0 does not clip."""
    tensor_parallel: int = number(1, low=1)
    """Ranks that share each layer; what tensor, pipeline and context parallel leave of the actor's devices is data parallel."""
    pipeline_parallel: int = number(1, low=1)
    """Stages that the layers are divided into; megatron.virtual_pipeline_model_parallel_size interleaves them."""
    context_parallel: int = number(1, low=1)
    """Ranks that share each sequence."""
    expert_parallel: int = number(1, low=1)
    """Ranks that share the experts of a layer; megatron.expert_tensor_parallel_size splits each expert (by default tensor_parallel)."""
    max_tokens_per_rank: int = number(8192, low=1)
    """Token budget of one micro-batch; a single longer sequence gets a micro-batch of its own."""
    updates_per_batch: int = number(1, low=1)
    """Optimizer steps that one batch is divided into, by groups."""
    epochs_per_batch: int = number(1, low=1)
    """Passes over one batch."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Performance options of megatron-core's config dataclasses by their own names, e.g. recompute_granularity."""


def decay_length(trainer: TrainerConfig, steps: int) -> int:
    """Optimizer steps of the final decay of a run of `steps` in all: trainer.decay_steps, or what it is by default.

    wsd: a tenth of all steps, at least two, the first of which is still at trainer.lr. cosine: all that follow the warm-up.
    """
    if trainer.decay_steps is not None:
        return trainer.decay_steps
    if trainer.schedule == "wsd":
        return max(min(2, steps - trainer.warmup_steps), steps // 10, 1)
    return max(1, steps - trainer.warmup_steps)
