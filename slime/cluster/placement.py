"""Where the processes of a role may run: one placement group a device pool, one bundle a device."""

from dataclasses import dataclass
from typing import Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.cluster.session import Cluster
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.config.roles import RoleNeed, role_needs


@dataclass(frozen=True)
class RolePlacement:
    """The devices of one role: bundle `bundles[i]` of `group` holds device i, with `cpus` CPUs beside it."""

    role: str
    group: PlacementGroup
    bundles: list[int]
    device: Literal["cpu", "cuda"]
    cpus: float

    def strategy(self, index: int) -> PlacementGroupSchedulingStrategy:
        """Scheduling strategy of an actor that runs on device `index` of the role."""
        return PlacementGroupSchedulingStrategy(self.group, self.bundles[index], placement_group_capture_child_tasks=False)


def bundle(need: RoleNeed, device: str) -> dict[str, float]:
    """Ray resources of one device of a role."""
    return {"CPU": need.cpus} | ({"GPU": 1.0} if device == "cuda" else {})


def place(cfg: SlimeConfig, cluster: Cluster) -> dict[str, RolePlacement]:
    """Reserve the devices of every role that the recipe needs, packed on as few hosts as possible.

    Raises PreflightError if a role is not placed within cluster.start_timeout_s; it says what was free.
    """
    placed = {}
    for role, need in role_needs(cfg).items():
        asked = bundle(need, cluster.device)
        free = ray.available_resources()
        group = placement_group([asked] * need.devices, strategy="PACK")
        if not group.wait(cfg.cluster.start_timeout_s):
            remove_placement_group(group)
            raise PreflightError(
                f"role {role} asks for {need.devices} x {_resources(asked)} and the cluster had {_resources(free)} free; "
                f"not placed after {cfg.cluster.start_timeout_s:g} s (cluster.start_timeout_s): end what else runs there or "
                f"lower cluster.roles.{role}.devices"
            )
        placed[role] = RolePlacement(role, group, list(range(need.devices)), cluster.device, need.cpus)
    return placed


def _resources(amounts: dict[str, float]) -> str:
    """CPUs and GPUs in words: 2 CPUs + 1 GPU."""
    parts = [
        f"{amounts.get(kind, 0):g} {kind}{'s' if amounts.get(kind, 0) != 1 else ''}"
        for kind in ("CPU", "GPU")
        if kind == "CPU" or kind in amounts
    ]
    return " + ".join(parts)
