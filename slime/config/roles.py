"""Which roles a recipe needs and what they ask of the cluster: arithmetic on the config alone."""

from dataclasses import dataclass

from slime.config import SlimeConfig


@dataclass(frozen=True)
class RoleNeed:
    """What one role asks for: `devices` bundles of `cpus` CPUs each, and a GPU each on CUDA."""

    role: str
    devices: int
    cpus: float  # of one bundle


def needed_roles(cfg: SlimeConfig) -> tuple[str, ...]:
    """Roles that a run of this recipe starts. Supervised learning, replay and external engines start no engine."""
    trains = cfg.run.only != "rollout"
    serves = cfg.run.only != "train" and cfg.algorithm.name != "sft" and not cfg.rollout.external_urls
    return tuple(role for role, needed in (("actor", trains), ("rollout", serves)) if needed)


def role_needs(cfg: SlimeConfig) -> dict[str, RoleNeed]:
    """What each needed role asks of the cluster."""
    cpus = {"actor": cfg.cluster.cpus_per_rank, "rollout": cfg.cluster.cpus_per_engine}
    return {role: RoleNeed(role, cfg.cluster.roles[role].devices, cpus[role]) for role in needed_roles(cfg)}
