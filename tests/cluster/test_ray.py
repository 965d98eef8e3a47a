"""One real Ray for this file: placement, deadlines, preflight, joining it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from slime.cluster import deadline, preflight, reaper
from slime.cluster.placement import RolePlacement, place
from slime.cluster.session import Cluster, connect
from slime.config import RoleConfig, SlimeConfig
from slime.config.exits import PreflightError

pytestmark = pytest.mark.e2e


def recipe(actor: int = 2, rollout: int = 1, device: str = "cpu") -> SlimeConfig:
    cfg = SlimeConfig()
    cfg.cluster.device = device
    cfg.cluster.roles = {"actor": RoleConfig(actor), "rollout": RoleConfig(rollout)}
    return cfg


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def cluster(run_dir: Path) -> Iterator[Cluster]:
    with connect(recipe(actor=4, rollout=2), run_dir) as connected:
        yield connected
    assert not ray.is_initialized()
    (logs,) = (run_dir / "logs" / "ray").iterdir()
    assert logs.is_dir() and not logs.is_symlink() and (logs / "raylet.out").is_file()
    assert not connected.scratch or not connected.scratch.path.exists()


@pytest.fixture(scope="module")
def placed(cluster: Cluster) -> dict[str, RolePlacement]:
    return place(recipe(), cluster)


@ray.remote
class Worker:
    def answer(self) -> int:
        return 42

    def refuse(self) -> None:
        raise ValueError("model.path=x: not a model")

    def sleep(self) -> None:
        time.sleep(60)

    def die(self) -> None:
        os._exit(1)

    def put(self) -> None:
        raise ray.exceptions.ObjectStoreFullError("Failed to put object 12 in object store because it is full")  # as ray.put does


@ray.remote
class Unborn:
    def __init__(self) -> None:
        raise ValueError("no model")

    def answer(self) -> int:
        return 42


def on(placed: dict[str, RolePlacement], role: str, index: int) -> "ray.actor.ActorHandle":
    return Worker.options(num_cpus=placed[role].cpus, scheduling_strategy=placed[role].strategy(index)).remote()


def test_local_ray_has_the_cpus_that_roles_ask_for(cluster: Cluster, run_dir: Path) -> None:
    assert cluster.local and cluster.device == "cpu" and cluster.address.startswith("127.0.0.2:")
    assert ray.cluster_resources()["CPU"] >= 6
    (logs,) = (run_dir / "logs" / "ray").iterdir()
    assert logs.is_symlink() and (logs / "raylet.out").exists()


def test_the_reaper_knows_every_process_of_a_local_ray(cluster: Cluster) -> None:
    """Ray's agents give themselves titles, which must not hide whose they are."""
    assert cluster.scratch is not None
    commands = {p.pid: " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)}
    others = "multiprocessing.forkserver"  # of another test, with Ray's folders among its arguments
    of_ray = {pid: line for pid, line in commands.items() if ("/ray/" in line or "ray::" in line) and others not in line}
    marked = set(reaper.living(f"{reaper.MARK}={cluster.scratch.path.name}".encode()))
    assert any("RuntimeEnvAgent" in command for command in of_ray.values())
    assert [command for pid, command in of_ray.items() if pid not in marked and pid != cluster.scratch._reaper.pid] == []


def test_every_role_has_its_bundles(placed: dict[str, RolePlacement]) -> None:
    assert {role: (p.role, p.bundles, p.device, p.cpus) for role, p in placed.items()} == {
        "actor": ("actor", [0, 1], "cpu", 1.0),
        "rollout": ("rollout", [0], "cpu", 1.0),
    }
    assert placed["actor"].group.bundle_specs == [{"CPU": 1.0}, {"CPU": 1.0}]


def test_deadlines(placed: dict[str, RolePlacement]) -> None:
    worker = on(placed, "actor", 1)
    assert deadline.get(worker.answer.remote(), 30, "a rank") == 42
    assert deadline.get([worker.answer.remote()] * 2, 30, "a rank") == [42, 42]
    with pytest.raises(ValueError) as refused:
        deadline.get(worker.refuse.remote(), 30, "a rank")
    assert type(refused.value) is ValueError and str(refused.value) == "model.path=x: not a model"
    assert "in refuse" in str(refused.value.__cause__)
    with pytest.raises(TimeoutError) as late:
        deadline.get(worker.sleep.remote(), 0.3, "the update of step 3", "cluster.step_timeout_s")
    assert str(late.value) == "waiting for the update of step 3: nothing after 0.3 s (cluster.step_timeout_s)"
    with pytest.raises(RuntimeError, match=r"waiting for a batch: Ray's object store is full \(.*\); raise cluster\.object_store_mb"):
        deadline.get(on(placed, "actor", 0).put.remote(), 30, "a batch")
    looks: list[int] = []
    with deadline.watch(lambda: looks.append(1)), pytest.raises(TimeoutError):
        deadline.get(worker.sleep.remote(), 2.5, "nothing", meanwhile=lambda: looks.append(2))
    assert looks == [1, 2, 1, 2]
    ray.kill(worker)


def test_dead_processes_are_named(placed: dict[str, RolePlacement], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as died:
        deadline.get(on(placed, "rollout", 0).die.remote(), 30, "the engines' hosts")
    assert str(died.value).startswith("waiting for the engines' hosts: a process died or was lost (ActorDiedError): The actor died")
    with pytest.raises(RuntimeError) as unborn:
        deadline.get(Unborn.options(num_cpus=0).remote().answer.remote(), 30, "a rank")
    assert str(unborn.value) == "waiting for a rank: its process failed to start: ValueError: no model"
    assert capfd.readouterr().out == ""  # stdout belongs to training


def test_waiting_in_a_coroutine(placed: dict[str, RolePlacement]) -> None:
    import asyncio

    async def wait() -> None:
        worker = on(placed, "actor", 0)
        assert await deadline.get_async([worker.answer.remote()] * 2, 30, "a rank") == [42, 42]
        assert await deadline.get_async(worker.answer.remote(), 30, "a rank") == 42
        with pytest.raises(ValueError, match=r"^model.path=x: not a model$"):
            await deadline.get_async(worker.refuse.remote(), 30, "a rank")
        with pytest.raises(TimeoutError, match=r"^waiting for a rank: nothing after 0.3 s$"):
            await deadline.get_async(worker.sleep.remote(), 0.3, "a rank")
        ray.kill(worker)

    asyncio.run(wait())


def test_role_that_finds_no_place(cluster: Cluster, placed: dict[str, RolePlacement]) -> None:
    cfg = recipe(actor=40)
    cfg.cluster.start_timeout_s = 0.5
    with pytest.raises(PreflightError) as raised:
        place(cfg, cluster)
    free = ray.cluster_resources()["CPU"] - 3
    assert str(raised.value) == (
        f"role actor asks for 40 x 1 CPU and the cluster had {free:g} CPUs free; not placed after 0.5 s (cluster.start_timeout_s): "
        "end what else runs there or lower cluster.roles.actor.devices"
    )


def test_preflight_names_too_few_cpus(cluster: Cluster) -> None:
    preflight.check_resources(recipe(), cluster)
    with pytest.raises(PreflightError) as raised:
        preflight.check_resources(recipe(actor=100), cluster)
    assert str(raised.value) == (
        f"the recipe asks for 101 CPUs (actor 100 x 1 + rollout 1 x 1) and the cluster has {ray.cluster_resources()['CPU']:g}: lower "
        "cluster.cpus_per_rank, cluster.cpus_per_engine or cluster.roles.<role>.devices, or join a larger cluster (cluster.address)"
    )
    wide = recipe()
    wide.cluster.cpus_per_engine = 500
    with pytest.raises(
        PreflightError, match=r"^cluster.cpus_per_engine=500: no host of the cluster has that many CPUs \(the largest has \d+\)"
    ):
        preflight.check_resources(wide, cluster)


def test_preflight_names_too_few_gpus(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 2.0})
    with pytest.raises(PreflightError) as raised:
        preflight.check_resources(recipe(), Cluster(cluster.address, "cuda", None))
    assert str(raised.value) == (
        "the recipe asks for 3 GPUs (actor 2 + rollout 1) and the cluster has 2: lower cluster.roles.<role>.devices, "
        "set cluster.device=cpu, or join a larger cluster (cluster.address)"
    )


def test_every_host_sees_the_run_directory(placed: dict[str, RolePlacement], run_dir: Path) -> None:
    before = sorted(run_dir.iterdir())
    preflight.check_run_dir(placed, run_dir)
    assert sorted(run_dir.iterdir()) == before


def test_host_that_does_not_see_the_run_directory(
    placed: dict[str, RolePlacement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/self/cwd is a folder of its own to each process: here the driver's is another than the workers'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "VISIBLE_S", 1.0)
    with pytest.raises(PreflightError) as raised:
        preflight.check_run_dir(placed, Path("/proc/self/cwd"))
    assert str(raised.value) == (
        "127.0.0.2 does not see /proc/self/cwd, which the driver wrote to: set run.dir to a file system that all hosts share"
    )
    assert not list(tmp_path.iterdir())


JOIN = """
import ray, sys
from pathlib import Path
from slime.cluster.session import connect
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
cfg = SlimeConfig()
with connect(cfg, Path(sys.argv[1])) as cluster:
    print(cluster.local, cluster.device, int(ray.cluster_resources()["CPU"]))
cfg.cluster.device = "cuda"
try:
    connect(cfg, Path(sys.argv[1]))
except PreflightError as error:
    print(error, ray.is_initialized())
"""


def test_joining_a_cluster_leaves_it_running(cluster: Cluster, tmp_path: Path) -> None:
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    joined = subprocess.run([sys.executable, "-c", JOIN, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60)
    assert joined.stdout.splitlines() == [
        f"False cpu {ray.cluster_resources()['CPU']:g}",
        "cluster.device=cuda and the cluster has no GPU: set cluster.device=cpu, or join a cluster that has them (cluster.address) False",
    ], joined.stderr
    assert ray.cluster_resources()["CPU"] >= 6
