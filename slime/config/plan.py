"""What a recipe will occupy, by arithmetic alone: devices by role, the batch, memory of a rank and of an engine (`plan_memory`), and of
both on one device (`plan_share`)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from slime.config import SlimeConfig
from slime.config.check_files import model_config
from slime.config.exits import ConfigError
from slime.config.of_critic import of_critic
from slime.config.parallel import parallel_sizes
from slime.config.plan_memory import Beside, EngineMemory, Model, RankMemory, count_parameters, engine_memory, longest, rank_memory
from slime.config.plan_share import SharePlan, share_plan
from slime.config.roles import RoleNeed, generates, held_teachers, role_needs, samples_per_prompt, shares, uses_critic, uses_reference


@dataclass(frozen=True)
class UpdatePlan:
    """One update in numbers, where the recipe trains. Token counts take every prompt and answer as long as allowed."""

    optimizer_steps: int  # on one batch
    samples: int  # in one optimizer step
    data_parallel: int
    samples_per_rank: int  # in one optimizer step, about: work is balanced by tokens. Ranks of one copy of the model count as one
    tokens_per_rank: int  # of that many samples
    micro_batches: int  # of that many samples


@dataclass(frozen=True)
class BatchPlan:
    """One step in numbers. `update` is None with run.only=rollout."""

    prompts: int
    samples: int  # of all prompts
    update: UpdatePlan | None


@dataclass(frozen=True)
class MemoryPlan:
    """`rank` is None where the recipe starts no trainer, `critic` where it gives a critic no devices, `engine` where it starts no
    engine."""

    parameters: int  # of the whole model
    rank: RankMemory | None  # of the pipeline stage that takes the most
    critic: RankMemory | None  # of a critic's own ranks
    engine: EngineMemory | None


@dataclass(frozen=True)
class Plan:
    """The resource plan of a recipe. `memory` is None where a model is still on the hub, `shared` also where no devices are shared, or they
    are of a CPU."""

    roles: dict[str, RoleNeed]
    batch: BatchPlan
    memory: MemoryPlan | None
    shared: SharePlan | None


def plan(cfg: SlimeConfig) -> Plan:
    """The plan of a checked recipe; reads the model's config.json and the headers of its safetensors."""
    roles = role_needs(cfg)
    batch = batch_plan(cfg, roles)
    memory = memory_plan(cfg, roles, batch)
    shared = None
    if shares(cfg) and cfg.cluster.device != "cpu" and memory is not None:
        assert memory.rank is not None and memory.engine is not None, "both are needed"
        shared = share_plan(cfg, memory.rank, memory.engine)
    return Plan(roles, batch, memory, shared)


def batch_plan(cfg: SlimeConfig, roles: dict[str, RoleNeed]) -> BatchPlan:
    """Prompts x samples, divided into optimizer steps, ranks and micro-batches."""
    prompts = cfg.rollout.prompts_per_step
    samples = prompts * samples_per_prompt(cfg)
    return BatchPlan(prompts, samples, update_plan(cfg, samples, roles["actor"].devices) if "actor" in roles else None)


def update_plan(cfg: SlimeConfig, samples: int, devices: int) -> UpdatePlan:
    """A batch of `samples` over the devices of the actor, or of its critic."""
    trainer, sizes = cfg.trainer, parallel_sizes(cfg.trainer)
    replicas = sizes.data(devices)
    per_step = samples // trainer.updates_per_batch
    per_rank = math.ceil(per_step / replicas)
    fit = max(1, trainer.max_tokens_per_rank * sizes.context // longest(cfg))
    rounds = sizes.pipeline if sizes.virtual > 1 else 1  # interleaved stages take micro-batches in rounds
    return UpdatePlan(
        optimizer_steps=trainer.updates_per_batch * trainer.epochs_per_batch,
        samples=per_step,
        data_parallel=replicas,
        samples_per_rank=per_rank,
        tokens_per_rank=per_rank * longest(cfg),
        micro_batches=math.ceil(math.ceil(per_rank / fit) / rounds) * rounds,
    )


def memory_plan(cfg: SlimeConfig, roles: dict[str, RoleNeed], batch: BatchPlan) -> MemoryPlan | None:
    """The formulas of `plan_memory`, for the model in model.path, the critic's, the reference and the teachers that ranks hold. None where
    one of them is still on the hub."""
    config = model_config(cfg)
    if config is None:
        return None
    parameters = count_parameters(Path(cfg.model.path), config)
    rank = own = None
    if batch.update is not None:
        model = Model(config, parameters, roles["actor"].devices)
        critic = _critic(cfg, roles) if uses_critic(cfg.algorithm) else None
        paths = {f"algorithm.teachers.{name}.path": cfg.algorithm.teachers[name].path for name in held_teachers(cfg)}
        teachers = [_held(cfg, knob, path, model.devices) for knob, path in paths.items()]
        if (uses_critic(cfg.algorithm) and critic is None) or None in teachers:
            return None
        if critic is not None and "critic" in roles:
            own, critic = rank_memory(of_critic(cfg), critic, update_plan(cfg, batch.samples, critic.devices).micro_batches), None
        beside = Beside(
            critic=critic,
            reference=model if uses_reference(cfg.algorithm) else None,
            teachers=tuple(teacher for teacher in teachers if teacher is not None),
            snapshot=generates(cfg) and cfg.sync.mode == "delta" and cfg.sync.snapshot == "device",
        )
        rank = rank_memory(cfg, model, batch.update.micro_batches, beside)
    engine = engine_memory(cfg, config, parameters.total, batch.samples) if "rollout" in roles else None
    return MemoryPlan(parameters.total, rank, own, engine)


def _critic(cfg: SlimeConfig, roles: dict[str, RoleNeed]) -> Model | None:
    """None for a critic.path that is still on the hub."""
    own = of_critic(cfg)
    knob = "model.path" if cfg.critic.path is None else "critic.path"
    model = _held(own, knob, own.model.path, roles.get("critic", roles["actor"]).devices)
    return None if model is None else Model.critic(own, model.config, model.parameters, model.devices)


def _held(cfg: SlimeConfig, knob: str, path: str, devices: int) -> Model | None:
    """The model of another directory than the policy's, which `knob` names, on as many devices; None for one that is still on the hub.
    Raises ConfigError where there is none."""
    try:
        config = model_config(replace(cfg, model=replace(cfg.model, path=path)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", knob)) from error
    return None if config is None else Model(config, count_parameters(Path(path), config), devices)
