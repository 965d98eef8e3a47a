"""One real SGLang server for the tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
