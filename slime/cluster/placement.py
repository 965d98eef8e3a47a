"""Where the processes of a role may run: one placement group a device pool, one bundle a device.

Roles that share devices (cluster.share) have one pool: bundle i is one device, with the CPUs of both roles beside it, and a process of each
reserves half of its GPU. Ray gives the parts of one bundle's GPU from the same physical one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.cluster.session import Cluster
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.config.roles import Pool, pools


@dataclass(frozen=True)
class RolePlacement:
    """The devices of one role: bundle `bundles[i]` of `group` holds device i. A process of the role reserves `cpus` CPUs and `gpus` GPUs of
    it."""

    role: str
    group: PlacementGroup
    bundles: list[int]
    device: Literal["cpu", "cuda"]
    cpus: float
    gpus: float = 1.0  # on CUDA

    def strategy(self, index: int) -> PlacementGroupSchedulingStrategy:
        """Scheduling strategy of an actor that runs on device `index` of the role."""
        return PlacementGroupSchedulingStrategy(self.group, self.bundles[index], placement_group_capture_child_tasks=False)

    def options(self, index: int, environment: dict[str, str]) -> dict[str, Any]:
        """Ray's options of an actor that is the role's on device `index` and sees that device alone."""
        gpus, hidden = (self.gpus, {}) if self.device == "cuda" else (0, {"CUDA_VISIBLE_DEVICES": ""})
        runtime_env = {"env_vars": environment | hidden}
        return {"num_cpus": self.cpus, "num_gpus": gpus, "scheduling_strategy": self.strategy(index), "runtime_env": runtime_env}


def bundle(pool: Pool, device: str) -> dict[str, float]:
    """Ray resources of one device of a pool."""
    return {"CPU": pool.cpus} | ({"GPU": 1.0} if device == "cuda" else {})


def place(cfg: SlimeConfig, cluster: Cluster) -> dict[str, RolePlacement]:
    """Reserve the devices of every role that the recipe needs, packed on as few hosts as possible.

    Raises PreflightError if a role is not placed within cluster.start_timeout_s; it says what was free.
    """
    placed = {}
    for pool in pools(cfg):
        asked = bundle(pool, cluster.device)
        free = ray.available_resources()
        group = placement_group([asked] * pool.devices, strategy="PACK")
        if not group.wait(cfg.cluster.start_timeout_s):
            remove_placement_group(group)
            lower = " and ".join(f"cluster.roles.{need.role}.devices" for need in pool.needs)
            raise PreflightError(
                f"role {pool.name} asks for {pool.devices} x {_resources(asked)} and the cluster had {_resources(free)} free; "
                f"not placed after {cfg.cluster.start_timeout_s:g} s (cluster.start_timeout_s): end what else runs there or lower {lower}"
            )
        bundles = list(range(pool.devices))
        for need in pool.needs:
            placed[need.role] = RolePlacement(need.role, group, bundles, cluster.device, need.cpus, 1 / len(pool.needs))
    return placed


def _resources(amounts: dict[str, float]) -> str:
    """CPUs and GPUs in words: 2 CPUs + 1 GPU."""
    parts = [
        f"{amounts.get(kind, 0):g} {kind}{'s' if amounts.get(kind, 0) != 1 else ''}"
        for kind in ("CPU", "GPU")
        if kind == "CPU" or kind in amounts
    ]
    return " + ".join(parts)
