"""Which roles a recipe needs and what they ask of the cluster: arithmetic on the config alone."""

from dataclasses import dataclass

from slime.config import AlgorithmConfig, SlimeConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.exits import ConfigError
from slime.config.imports import load_function
from slime.config.tree import nearest

TEACHER = "teacher/"  # begins the name of a role


@dataclass(frozen=True)
class RoleNeed:
    """What one role asks for: `devices` devices with `cpus` CPUs each. Where roles share devices, see `Pool`."""

    role: str
    devices: int
    cpus: float  # beside one device


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


def uses_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether it compares the policy with a reference that ranks hold. As `needs_rollouts`."""
    if algorithm.name in ALGORITHMS:
        return bool(algorithm.kl_loss_coef or algorithm.kl_reward_coef)
    return _says(algorithm, "uses_reference")


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


def teacher_role(name: str) -> str:
    """The role of a teacher that slime serves."""
    return TEACHER + name


def served_teachers(cfg: SlimeConfig) -> set[str]:
    """Names of the teachers that SGLang serves, the user's servers or slime's own; the actor's ranks hold the others."""
    return {name for name, teacher in cfg.algorithm.teachers.items() if teacher.url is not None or teacher_role(name) in cfg.cluster.roles}


def held_teachers(cfg: SlimeConfig) -> list[str]:
    """Names of the teachers that the actor's ranks hold."""
    served = served_teachers(cfg)
    return [name for name in cfg.algorithm.teachers if name not in served]


def reads_groups(cfg: SlimeConfig) -> bool:
    """Whether teachers on the actor's ranks read each group by itself, some while engines generate others: the ranks wait for the rollout
    then. With algorithm.distill=full they speak in the pass in which the student learns."""
    return cfg.rollout.mode == "sync" and cfg.algorithm.distill in ("sampled", "topk") and bool(held_teachers(cfg))


def tensor_parallel(cfg: SlimeConfig, role: str) -> tuple[str, int]:
    """Devices of one server of a role that serves, and the knob that says so."""
    if not role.startswith(TEACHER):
        return "rollout.tensor_parallel", cfg.rollout.tensor_parallel
    name = role.removeprefix(TEACHER)
    return f"algorithm.teachers.{name}.tensor_parallel", cfg.algorithm.teachers[name].tensor_parallel


def needed_roles(cfg: SlimeConfig) -> tuple[str, ...]:
    """Roles that a run of this recipe starts. Demonstrations, replay and external engines start no engine, and no teacher without
    rollouts; a critic has ranks of its own where the recipe gives it devices."""
    trains, answers = cfg.run.only != "rollout", generates(cfg)
    own = [teacher_role(name) for name, teacher in cfg.algorithm.teachers.items() if teacher.url is None and name in served_teachers(cfg)]
    needed = {
        "actor": trains,
        "critic": trains and "critic" in cfg.cluster.roles and uses_critic(cfg.algorithm),
        "rollout": answers and not cfg.rollout.external_urls,
        **dict.fromkeys(own, answers),
    }
    return tuple(role for role, is_needed in needed.items() if is_needed)


def shares(cfg: SlimeConfig) -> bool:
    """Whether this run puts the actor's ranks and slime's engines on the same devices, as cluster.share asks where it has both."""
    return cfg.cluster.share != "none" and {"actor", "rollout"} <= set(needed_roles(cfg))


def swaps(cfg: SlimeConfig) -> bool:
    """Whether they have the memory of those devices in turn."""
    return cfg.cluster.share == "swap" and shares(cfg)


@dataclass(frozen=True)
class Pool:
    """Devices that are reserved together: those of one role, or of two that share them. Each is one bundle."""

    needs: tuple[RoleNeed, ...]  # of as many devices each

    @property
    def name(self) -> str:
        """Its roles."""
        return " + ".join(need.role for need in self.needs)

    @property
    def devices(self) -> int:
        return self.needs[0].devices

    @property
    def cpus(self) -> float:
        """Of one bundle."""
        return sum(need.cpus for need in self.needs)


def pools(cfg: SlimeConfig) -> list[Pool]:
    """The pools of every needed role, in the roles' order; the actor's comes first."""
    needs = role_needs(cfg)
    together = ("actor", "rollout") if shares(cfg) else ()
    shared = [Pool(tuple(needs[role] for role in together))] if together else []
    return shared + [Pool((need,)) for role, need in needs.items() if role not in together]


def role_needs(cfg: SlimeConfig) -> dict[str, RoleNeed]:
    """What each needed role asks of the cluster."""
    cluster = cfg.cluster
    cpus = dict.fromkeys(("actor", "critic"), cluster.cpus_per_rank)
    return {role: RoleNeed(role, cluster.roles[role].devices, cpus.get(role, cluster.cpus_per_engine)) for role in needed_roles(cfg)}
