"""Sizes that must divide: devices into parallel groups, prompts into updates, answers over ranks."""

from slime.config import SlimeConfig, TrainerConfig
from slime.config.exits import ConfigError
from slime.config.parallel import EMBEDDING, EXPERT_TENSOR, FIRST, LAST, LOSS, VIRTUAL, ParallelSizes, flag, parallel_sizes, whole
from slime.config.roles import TEACHER, needed_roles, samples_per_prompt, tensor_parallel


def check_sizes(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first sizes that do not divide; it names the knobs. What the model's own sizes must divide by is in
    `slime.models.check_layout`."""
    needed = needed_roles(cfg)
    for role in ("actor", "critic"):
        if role in needed:
            _trainer(cfg, role)
    if "rollout" in needed:
        _engines(cfg)
    for role in needed:
        if role.startswith(TEACHER):
            _teacher(cfg, role)


def _trainer(cfg: SlimeConfig, role: str) -> None:
    """Of the actor, and of a critic that has ranks of its own: they are divided alike."""
    devices, trainer = cfg.cluster.roles[role].devices, cfg.trainer
    sizes = parallel_sizes(trainer)
    _stages(trainer, sizes)
    _experts(trainer, sizes)
    _devices(role, devices, trainer, sizes)
    prompts, updates = cfg.rollout.prompts_per_step, trainer.updates_per_batch
    if prompts % updates:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} does not divide by trainer.updates_per_batch={updates}: make the prompts a multiple of it"
        )
    replicas, samples = sizes.data(devices), prompts // updates * samples_per_prompt(cfg)
    if samples < replicas:
        raise ConfigError(
            f"one update has {samples} samples and there are {replicas} data-parallel ranks (cluster.roles.{role}.devices={devices}, "
            f"{sizes.copy} for each copy of the model): raise rollout.prompts_per_step, or lower cluster.roles.{role}.devices or "
            "trainer.updates_per_batch"
        )


def _stages(trainer: TrainerConfig, sizes: ParallelSizes) -> None:
    """Options of pipeline stages that need several, or that exclude each other."""
    given = {f"{VIRTUAL}={sizes.virtual}": sizes.virtual > 1}
    given |= {f"{name}={size}": True for name in (FIRST, LAST) if (size := whole(trainer, name))}
    given |= {f"{name}=true": flag(trainer, name, False) for name in (EMBEDDING, LOSS)}
    wanted = [option for option, is_set in given.items() if is_set]
    if wanted and sizes.pipeline == 1:
        raise ConfigError(f"trainer.megatron.{wanted[0]} needs trainer.pipeline_parallel above 1: raise it, or remove the option")
    outer = [option for option in wanted if option.startswith((FIRST, LAST))]
    counted = [option for option in wanted if option.startswith((EMBEDDING, LOSS))]
    if outer and counted:
        raise ConfigError(f"trainer.megatron.{outer[0]} and trainer.megatron.{counted[0]} exclude each other: remove one")


def _experts(trainer: TrainerConfig, sizes: ParallelSizes) -> None:
    """megatron-core reduces gradients of experts among themselves only under expert parallelism; without it, it takes their groups to be
    those of all other parameters."""
    if sizes.expert == 1 and sizes.expert_tensor != sizes.tensor:
        raise ConfigError(
            f"trainer.megatron.{EXPERT_TENSOR}={sizes.expert_tensor} differs from trainer.tensor_parallel={sizes.tensor}, which needs "
            "trainer.expert_parallel above 1: raise it, or remove the option"
        )


def _devices(role: str, devices: int, trainer: TrainerConfig, sizes: ParallelSizes) -> None:
    """Whole copies of the model, and whole copies of its experts."""
    tensor, pipeline = ("trainer.tensor_parallel", sizes.tensor), ("trainer.pipeline_parallel", sizes.pipeline)
    split = (f"trainer.megatron.{EXPERT_TENSOR}", sizes.expert_tensor) if whole(trainer, EXPERT_TENSOR) else tensor
    copies = {
        "": (tensor, pipeline, ("trainer.context_parallel", sizes.context)),
        ", the ranks that hold all experts once": (split, ("trainer.expert_parallel", sizes.expert), pipeline),
    }
    for what, factors in copies.items():
        ranks = factors[0][1] * factors[1][1] * factors[2][1]
        if devices % ranks:
            said = " x ".join(f"{knob}={size}" for knob, size in factors if size > 1)
            mend = f"make the devices a multiple of {ranks if ' x ' in said else 'it'}"
            raise ConfigError(f"cluster.roles.{role}.devices={devices} does not divide by {said}{what}: {mend}")


def _engines(cfg: SlimeConfig) -> None:
    devices, engines, width = cfg.cluster.roles["rollout"].devices, cfg.rollout.engines, cfg.rollout.tensor_parallel
    if devices != engines * width:
        raise ConfigError(
            f"rollout.engines={engines} of rollout.tensor_parallel={width} take {engines * width} devices and "
            f"cluster.roles.rollout.devices={devices}: make them equal"
        )


def _teacher(cfg: SlimeConfig, role: str) -> None:
    """Whole servers on the devices of a teacher's role."""
    devices, (knob, width) = cfg.cluster.roles[role].devices, tensor_parallel(cfg, role)
    if devices % width:
        raise ConfigError(f"cluster.roles.{role}.devices={devices} does not divide by {knob}={width}: make the devices a multiple of it")
