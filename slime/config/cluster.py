"""cluster: which devices do what."""

from dataclasses import dataclass, field

from slime.config.fields import choice, number


@dataclass
class RoleConfig:
    devices: int = number(1, low=1)
    """Devices of this role."""


@dataclass
class ClusterConfig:
    device: str = choice("auto", "cpu", "cuda")
    """What ranks and engines compute on; auto takes CUDA where Ray has GPUs."""
    address: str | None = None
    """Ray cluster to join; by default RAY_ADDRESS, the surrounding Ray job, or a local one started for the run."""
    roles: dict[str, RoleConfig] = field(default_factory=lambda: {"actor": RoleConfig(), "rollout": RoleConfig()})
    """Devices by role: actor, rollout; critic, the actor's ranks unless named; teacher/<name> serves a teacher, with rollout's options."""
    share: str = choice("none", "split", "swap")
    """Do ranks and engines sit on the same devices? split divides their memory, swap gives all of it to one at a time."""
    cpus_per_rank: float = number(1.0, above=0)
    """Ray CPUs that one trainer rank reserves; on CPU also its thread count, rounded down. Beside a GPU, weights are coded by more."""
    cpus_per_engine: float = number(1.0, above=0)
    """Ray CPUs that one engine device reserves; on CPU also its thread count, rounded down."""
    object_store_mb: int = number(512, low=80)
    """Shared memory of a Ray that slime starts itself."""
    start_timeout_s: float = number(120.0, above=0)
    """Deadline for Ray, placement and ranks to come up."""
    step_timeout_s: float = number(3600.0, above=0)
    """Deadline for one rollout, update, save or evaluation."""
