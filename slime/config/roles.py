"""Which roles a recipe needs and what they ask of the cluster: arithmetic on the config alone."""

from dataclasses import dataclass

from slime.config import AlgorithmConfig, SlimeConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.exits import ConfigError
from slime.config.imports import load_function
from slime.config.tree import nearest


@dataclass(frozen=True)
class RoleNeed:
    """What one role asks for: `devices` bundles of `cpus` CPUs each, and a GPU each on CUDA."""

    role: str
    devices: int
    cpus: float  # of one bundle


def needs_rollouts(algorithm: AlgorithmConfig) -> bool:
    """Whether it learns from engines' answers, and not from demonstrations. A user's own algorithm is built and says so itself.

    Raises ConfigError for an algorithm.name that is not built in and does not load, or builds something else.
    """
    known = ALGORITHMS.get(algorithm.name)
    return known.needs_rollouts if known else _says(algorithm, "needs_rollouts")


def uses_critic(algorithm: AlgorithmConfig) -> bool:
    """Whether it learns from a critic's values. As `needs_rollouts`."""
    known = ALGORITHMS.get(algorithm.name)
    return known.critic if known else _says(algorithm, "uses_critic")


def _says(algorithm: AlgorithmConfig, what: str) -> bool:
    """A field of a user's own algorithm."""
    name = algorithm.name
    if ":" not in name:
        raise ConfigError(
            f"algorithm.name={name}: takes {', '.join(ALGORITHMS)} or an import path pkg.mod:fn{nearest(name, list(ALGORITHMS))}"
        )
    try:
        build = load_function(name, "algorithm.name")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        built = build(algorithm)
    except Exception as error:
        raise ConfigError(f"algorithm.name={name}: it failed with {type(error).__name__}: {error}") from error
    said = getattr(built, what, None)
    if not isinstance(said, bool):
        raise ConfigError(f"algorithm.name={name} returned {type(built).__name__}; it must return slime.algorithms.base.Algorithm")
    return said


def generates(cfg: SlimeConfig) -> bool:
    """Whether engines answer prompts in this run, slime's own or those of rollout.external_urls."""
    return cfg.run.only != "train" and needs_rollouts(cfg.algorithm)


def samples_per_prompt(cfg: SlimeConfig) -> int:
    """Samples that a prompt brings to the batch: a group of answers, or one demonstration."""
    return cfg.rollout.samples_per_prompt if needs_rollouts(cfg.algorithm) else 1


def needed_roles(cfg: SlimeConfig) -> tuple[str, ...]:
    """Roles that a run of this recipe starts. Demonstrations, replay and external engines start no engine; a critic has ranks of its
    own where the recipe gives it devices."""
    trains = cfg.run.only != "rollout"
    judges = trains and "critic" in cfg.cluster.roles and uses_critic(cfg.algorithm)
    serves = generates(cfg) and not cfg.rollout.external_urls
    return tuple(role for role, needed in (("actor", trains), ("critic", judges), ("rollout", serves)) if needed)


def role_needs(cfg: SlimeConfig) -> dict[str, RoleNeed]:
    """What each needed role asks of the cluster."""
    cpus = {"actor": cfg.cluster.cpus_per_rank, "critic": cfg.cluster.cpus_per_rank, "rollout": cfg.cluster.cpus_per_engine}
    return {role: RoleNeed(role, cfg.cluster.roles[role].devices, cpus[role]) for role in needed_roles(cfg)}
