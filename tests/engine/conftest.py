"""One real SGLang server for the tests of this room, and a Ray with room for two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from slime.cluster.placement import RolePlacement
from slime.engine.server import Server
from tests.engine import servers
from tests.tiny import make_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets of weights of one shape."""
    root = tmp_path_factory.mktemp("models")
    return make_tiny(root / "a", seed=0), make_tiny(root / "b", seed=1)


@pytest.fixture(scope="session")
def server(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in deterministic mode."""
    cfg = servers.recipe(models[0])
    cfg.run.deterministic = True
    started = servers.start(cfg, tmp_path_factory.mktemp("server") / "logs" / "engine_0.log")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def placement() -> Iterator[RolePlacement]:
    """Two devices of the rollout role on a Ray of a module's own."""
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 << 20}
    ray.init(address="local", num_cpus=2, **options)
    group = placement_group([{"CPU": 1}] * 2)
    ray.get(group.ready(), timeout=60)
    yield RolePlacement("rollout", group, [0, 1], "cpu", 1.0)
    remove_placement_group(group)
    ray.shutdown()
