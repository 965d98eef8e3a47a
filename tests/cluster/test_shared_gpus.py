"""Roles that share devices, by a real Ray that counts GPUs which are not there: a rank and an engine are given the same one."""

from collections.abc import Iterator

import pytest
import ray

from slime.cluster.placement import RolePlacement, place
from slime.cluster.session import Cluster
from slime.config import RoleConfig, SlimeConfig
from slime.config.exits import PreflightError
from slime.engine.fleet import _by_host

pytestmark = pytest.mark.e2e


def recipe(devices: int) -> SlimeConfig:
    """PPO, whose critic has a device of its own."""
    cfg = SlimeConfig()
    cfg.cluster.share, cfg.algorithm.name, cfg.rollout.engines = "split", "ppo", devices
    cfg.cluster.cpus_per_rank, cfg.cluster.cpus_per_engine = 0.5, 0.25
    cfg.cluster.roles = {"actor": RoleConfig(devices), "rollout": RoleConfig(devices), "critic": RoleConfig(1)}
    return cfg


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield Cluster("", "cuda", None)
    ray.shutdown()


@ray.remote
class Rank:
    """Keeps its part of a GPU, as a rank does."""

    def gpus(self) -> list[int]:
        return [int(number) for number in ray.get_gpu_ids()]


def ranks_on(placement: RolePlacement) -> list["ray.actor.ActorHandle"]:
    return [
        Rank.options(num_cpus=placement.cpus, num_gpus=placement.gpus, scheduling_strategy=placement.strategy(device)).remote()
        for device in range(len(placement.bundles))
    ]


def test_a_rank_and_an_engine_have_the_same_gpu(cluster: Cluster) -> None:
    cfg = recipe(3)
    placed = place(cfg, cluster)
    assert {role: (p.gpus, p.cpus) for role, p in placed.items()} == {"actor": (0.5, 0.5), "rollout": (0.5, 0.25), "critic": (1.0, 0.5)}
    assert placed["actor"].group == placed["rollout"].group != placed["critic"].group
    assert placed["actor"].group.bundle_specs == [{"CPU": 0.75, "GPU": 1.0}] * 3
    actors, [critic] = ranks_on(placed["actor"]), ranks_on(placed["critic"])
    of_actors = [ids for [ids] in ray.get([actor.gpus.remote() for actor in actors])]
    [(positions, assignments)] = _by_host(cfg, placed["rollout"])
    assert positions == [0, 1, 2] and [gpu for assignment in assignments for gpu in assignment.gpus] == of_actors
    assert sorted([*of_actors, *ray.get(critic.gpus.remote())]) == [0, 1, 2, 3], "and no two others do"
    cfg.cluster.start_timeout_s = 0.5
    with pytest.raises(
        PreflightError, match=r"role actor \+ rollout asks for 3 x 0\.75 CPUs \+ 1 GPU .* lower cluster\.roles\.actor\.devices and"
    ):
        place(cfg, cluster)
