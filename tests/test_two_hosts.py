"""A cluster of two raylets, each with room for one role: one is killed, another takes its place, and the run goes on by itself."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.launch import finish, make_inputs, start, wait_for_line

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
HOST = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    started = Cluster(initialize_head=True, head_node_args={**HOST, "include_dashboard": False})
    yield started
    started.shutdown()


def nodes_of_roles(address: str) -> set[str]:
    """Nodes that hold a bundle of a placement group."""
    ray.init(address=address, log_to_driver=False)
    try:
        groups = ray.util.placement_group_table().values()
        return {node for group in groups if group["state"] == "CREATED" for node in group["bundles_to_node_id"].values()}
    finally:
        ray.shutdown()


def test_a_killed_raylet_is_survived(cluster: Cluster, tmp_path: Path) -> None:
    second = cluster.add_node(**HOST)
    inputs = make_inputs(tmp_path)
    overrides = (f"cluster.address={cluster.address}", "run.steps=12", "run.save_every=2", "run.deterministic=true")
    process, offspring = start(inputs, "hosts", *overrides)
    run_dir = inputs / "runs" / "hosts"
    wait_for_line(run_dir / "latest_checkpointed_iteration.txt", 1)
    assert len(nodes_of_roles(cluster.address)) == 2, "one role on each"
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    cluster.remove_node(second, allow_graceful=False)
    time.sleep(5.0)
    cluster.add_node(**HOST)
    run = finish(process, offspring, run_dir)
    assert run.code == 0, run.out + run.err
    assert [line["step"] for line in run.metrics] == list(range(13))
    assert "restart 1 of 3" in (run_dir / "logs" / "driver.log").read_text()
    state = json.loads((run_dir / "iter_0000012" / "state.json").read_text())
    assert state["version"]["epoch"] >= 1 and saved >= 2
    quiet = start(inputs, "quiet", "run.steps=12", "run.save_every=2", "run.deterministic=true")
    alone = finish(*quiet, inputs / "runs" / "quiet")
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (run_dir, alone.run_dir)]
    assert weights[0] == weights[1]
