"""The critic: there is one where the algorithm uses it, and the policy learns too."""

from dataclasses import fields

from slime.config import SlimeConfig
from slime.config.check_inert import changed, setting
from slime.config.exits import ConfigError
from slime.config.roles import uses_critic


def check_critic(cfg: SlimeConfig) -> None:
    """Raises ConfigError for knobs of a critic that the algorithm does not use, or that contradict each other."""
    critic = cfg.critic
    if not uses_critic(cfg.algorithm):
        given = [setting(cfg, f"critic.{field.name}") for field in fields(critic) if changed(critic, field.name)]
        given += [f"cluster.roles.critic.devices={role.devices}" for name, role in cfg.cluster.roles.items() if name == "critic"]
        if given:
            verb, them = ("has", "it") if len(given) == 1 else ("have", "them")
            raise ConfigError(
                f"{', '.join(given)} {verb} no effect with algorithm.name={cfg.algorithm.name}, which uses no critic: remove {them}, or "
                "choose ppo"
            )
        return
    if critic.warmup_steps >= cfg.run.steps:
        raise ConfigError(
            f"critic.warmup_steps={critic.warmup_steps} leaves the policy none of run.steps={cfg.run.steps} to learn in: lower it"
        )
