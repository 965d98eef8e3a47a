"""Does the cluster have what the recipe asks for, and do its hosts see the run's directory? Answered within seconds, first of all."""

import secrets
import time
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from slime.cluster import deadline
from slime.cluster.placement import RolePlacement
from slime.cluster.session import Cluster
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.config.roles import pools, role_needs, tensor_parallel

VISIBLE_S = 8.0  # for a file to show on another host: network file systems cache
CPU_KNOB = dict.fromkeys(("actor", "critic"), "cluster.cpus_per_rank")  # of those that are ranks
ENGINE_CPU_KNOB = "cluster.cpus_per_engine"  # of all other roles


def check_resources(cfg: SlimeConfig, cluster: Cluster) -> None:
    """Compare what all roles ask for with what the cluster has. Raises PreflightError naming what is missing and the knob."""
    needs = role_needs(cfg)
    has = ray.cluster_resources()
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    widest = max((host.get("CPU", 0) for host in hosts), default=0)
    for role, need in needs.items():
        knob = CPU_KNOB.get(role, ENGINE_CPU_KNOB)
        if need.cpus > widest:
            raise PreflightError(
                f"{knob}={need.cpus:g}: no host of the cluster has that many CPUs (the largest has {widest:g}); lower {knob}"
            )
    for pool in pools(cfg):
        if pool.cpus > widest:
            raise PreflightError(
                f"cluster.share={cfg.cluster.share}: a device of {pool.name} needs {pool.cpus:g} CPUs on its host (cluster.cpus_per_rank + "
                f"cluster.cpus_per_engine) and the largest has {widest:g}; lower one of them"
            )
    asked = " + ".join(f"{role} {need.devices} x {need.cpus:g}" for role, need in needs.items())
    cpus = sum(need.devices * need.cpus for need in needs.values())
    if cpus > has.get("CPU", 0):
        raise PreflightError(
            f"the recipe asks for {cpus:g} CPUs ({asked}) and the cluster has {has.get('CPU', 0):g}: lower cluster.cpus_per_rank, "
            "cluster.cpus_per_engine or cluster.roles.<role>.devices, or join a larger cluster (cluster.address)"
        )
    if cluster.device == "cuda":
        _check_gpus(cfg, has.get("GPU", 0), max((host.get("GPU", 0) for host in hosts), default=0))


def _check_gpus(cfg: SlimeConfig, total: float, widest: float) -> None:
    needs = role_needs(cfg)
    gpus = sum(pool.devices for pool in pools(cfg))
    if gpus > total:
        asked = " + ".join(f"{' and '.join(need.role for need in pool.needs)} {pool.devices}" for pool in pools(cfg))
        raise PreflightError(
            f"the recipe asks for {gpus} GPUs ({asked}) and the cluster has {total:g}: lower cluster.roles.<role>.devices, "
            "set cluster.device=cpu, or join a larger cluster (cluster.address)"
        )
    for role in (role for role in needs if role not in CPU_KNOB):  # those that serve
        knob, size = tensor_parallel(cfg, role)
        if size > widest:
            raise PreflightError(f"{knob}={size}: a server stays on one host and the largest has {widest:g} GPUs; lower {knob}")


def check_run_dir(placements: dict[str, RolePlacement], run_dir: Path) -> None:
    """Every host of every role reads a file that the driver writes in the run's directory.

    Raises PreflightError naming the hosts that do not see it within VISIBLE_S seconds.
    """
    proof = run_dir / f".visible-{secrets.token_hex(8)}"
    proof.write_text(proof.name)
    nodes = {node for placed in placements.values() for node in placement_group_table(placed.group)["bundles_to_node_id"].values()}
    try:
        asked = [
            _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(proof), VISIBLE_S)
            for node in nodes
        ]
        answers = deadline.get(asked, VISIBLE_S + 2, f"every host to read {proof}")
    finally:
        proof.unlink()
    blind = sorted(host for host, sees in answers if not sees)
    if blind:
        raise PreflightError(
            f"{', '.join(blind)} does not see {run_dir}, which the driver wrote to: set run.dir to a file system that all hosts share"
        )


@ray.remote(num_cpus=0, max_retries=0)
def _sees(path: str, within_s: float) -> tuple[str, bool]:
    """This host's address, and whether it reads there what the driver wrote."""
    give_up = time.monotonic() + within_s
    while not (sees := Path(path).is_file() and Path(path).read_text() == Path(path).name) and time.monotonic() < give_up:
        time.sleep(0.2)
    return ray.util.get_node_ip_address(), sees
