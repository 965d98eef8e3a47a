"""Sizes that must divide: devices into parallel groups, prompts into updates, answers over ranks."""

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.roles import needed_roles, samples_per_prompt


def check_sizes(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first sizes that do not divide; it names both knobs."""
    needed = needed_roles(cfg)
    if "actor" in needed:
        _trainer(cfg)
    if "rollout" in needed:
        _engines(cfg)


def _trainer(cfg: SlimeConfig) -> None:
    devices, trainer = cfg.cluster.roles["actor"].devices, cfg.trainer
    if devices % trainer.tensor_parallel:
        raise ConfigError(
            f"cluster.roles.actor.devices={devices} does not divide by trainer.tensor_parallel={trainer.tensor_parallel}: "
            "make the devices a multiple of it"
        )
    prompts, updates = cfg.rollout.prompts_per_step, trainer.updates_per_batch
    if prompts % updates:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} does not divide by trainer.updates_per_batch={updates}: make the prompts a multiple of it"
        )
    replicas, samples = devices // trainer.tensor_parallel, prompts // updates * samples_per_prompt(cfg)
    if samples < replicas:
        raise ConfigError(
            f"one update has {samples} samples and there are {replicas} data-parallel ranks (cluster.roles.actor.devices / "
            "trainer.tensor_parallel): raise rollout.prompts_per_step, or lower cluster.roles.actor.devices or trainer.updates_per_batch"
        )


def _engines(cfg: SlimeConfig) -> None:
    devices, engines, width = cfg.cluster.roles["rollout"].devices, cfg.rollout.engines, cfg.rollout.tensor_parallel
    if devices != engines * width:
        raise ConfigError(
            f"rollout.engines={engines} of rollout.tensor_parallel={width} take {engines * width} devices and "
            f"cluster.roles.rollout.devices={devices}: make them equal"
        )
