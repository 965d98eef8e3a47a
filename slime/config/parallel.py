"""How the actor's devices are divided: the sizes of every kind of parallelism, from trainer.* and trainer.megatron.*."""

from dataclasses import dataclass

from slime.config.exits import ConfigError
from slime.config.trainer import TrainerConfig

EXPERT_TENSOR, VIRTUAL, SEQUENCE = "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size", "sequence_parallel"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks of each kind of group. A copy of the model takes tensor x pipeline x context ranks; what is left is data parallel. Experts
    are divided anew: expert_tensor x expert x pipeline ranks hold all of them once."""

    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int
    virtual: int  # pipeline stages that each rank holds, interleaved; 1: none are
    sequence: bool  # activations between layers are split over the tensor-parallel ranks

    @property
    def copy(self) -> int:
        """Ranks that share one copy of the model, its experts aside."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_copy(self) -> int:
        """Ranks that share one copy of all experts."""
        return self.expert_tensor * self.expert * self.pipeline

    def data(self, devices: int) -> int:
        """Copies on that many devices."""
        return devices // self.copy

    def expert_data(self, devices: int) -> int:
        """Copies of all experts on that many devices."""
        return devices // self.expert_copy


def parallel_sizes(trainer: TrainerConfig) -> ParallelSizes:
    """The sizes that a recipe asks for. Raises ConfigError for a value of trainer.megatron.* that is not a size."""
    return ParallelSizes(
        tensor=trainer.tensor_parallel,
        pipeline=trainer.pipeline_parallel,
        context=trainer.context_parallel,
        expert=trainer.expert_parallel,
        expert_tensor=whole(trainer, EXPERT_TENSOR) or trainer.tensor_parallel,
        virtual=whole(trainer, VIRTUAL) or 1,
        sequence=flag(trainer, SEQUENCE, True) and trainer.tensor_parallel > 1,
    )


def whole(trainer: TrainerConfig, name: str) -> int | None:
    """trainer.megatron.<name>, a whole number of at least 1; None where it is absent or null. Raises ConfigError for anything else."""
    value = trainer.megatron.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"trainer.megatron.{name}={value}: takes a whole number, >= 1, or null")
    return value


def flag(trainer: TrainerConfig, name: str, default: bool) -> bool:
    """trainer.megatron.<name>, true or false; `default` where it is absent. Raises ConfigError for anything else."""
    value = trainer.megatron.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"trainer.megatron.{name}={'null' if value is None else value}: takes true or false")
    return value


def stage_layers(layers: int, trainer: TrainerConfig) -> list[int]:
    """Layers of each pipeline stage of a model with `layers` in all, by megatron-core's rules (TransformerConfig.__post_init__).

    Stages are equal, but for the first and last where FIRST and LAST say so; EMBEDDING and LOSS count what the first and last stage
    compute beside their layers as a layer. Interleaved stages divide each rank's layers once more. Raises ConfigError where something
    does not divide.
    """
    sizes = parallel_sizes(trainer)
    before, behind = whole(trainer, FIRST), whole(trainer, LAST)
    counted = [name for name in (EMBEDDING, LOSS) if flag(trainer, name, False)]
    middle = layers - (before or 0) - (behind or 0) + len(counted)
    stages = sizes.pipeline - (before is not None) - (behind is not None)
    if stages < 0 or middle < 0 or (middle % stages if stages else middle) or (stages and not middle):
        raise ConfigError(_uneven(layers, trainer, counted, middle, stages))
    of_ranks = [*([before] if before else []), *[middle // stages if stages else 0] * stages, *([behind] if behind else [])]
    if odd := [count for count in of_ranks if count % sizes.virtual]:
        split = ", ".join(filter(None, (f"trainer.pipeline_parallel={sizes.pipeline}", _said(trainer, (FIRST, LAST, *counted)))))
        raise ConfigError(
            f"trainer.megatron.{VIRTUAL}={sizes.virtual} does not divide the {odd[0]} layers of a pipeline stage "
            f"(of the model's {layers}, with {split}): choose one that does"
        )
    of_ranks[0] -= EMBEDDING in counted
    of_ranks[-1] -= LOSS in counted
    return of_ranks


def _uneven(layers: int, trainer: TrainerConfig, counted: list[str], middle: int, stages: int) -> str:
    """What to say of layers that do not divide."""
    fact = f"the model's {layers} layers do not divide into trainer.pipeline_parallel={trainer.pipeline_parallel} stages"
    if given := _said(trainer, (FIRST, LAST)):
        return f"{fact} with {given}, which leaves {middle} for {stages} others: change one of them"
    if given := _said(trainer, counted):
        return f"{fact} with {given}, which makes them {middle}: change one of them"
    return f"{fact}: choose another number, or name the layers of the outer ones by trainer.megatron.{FIRST} and {LAST}"


def _said(trainer: TrainerConfig, names: tuple[str, ...] | list[str]) -> str:
    """Those of the options that the recipe gives."""
    given = ((name, trainer.megatron.get(name)) for name in names)
    return ", ".join(f"trainer.megatron.{name}={str(value).lower()}" for name, value in given if value is not None)
