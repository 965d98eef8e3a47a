"""Toy engines under a weight channel, for tests/sync/test_faults_*.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.sync import inserver
from tests.sync import toy_engine
from tests.sync.toy_engine import ToyEngine
from tests.sync.world import World, Writes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_engine.make_model(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture
def ranks_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of a toy are in this process."""
    monkeypatch.setattr(inserver, "_rank", toy_engine.this_rank)


@pytest.fixture
def engine(model: Path, ranks_of_one_process: None) -> Iterator[ToyEngine]:
    """Of two ranks."""
    made = ToyEngine(model)
    yield made
    made.close()


@pytest.fixture
def world(model: Path, engine: ToyEngine) -> Iterator[World]:
    made = World(model, [engine])
    yield made
    made.close()


@pytest.fixture
def two(model: Path, engine: ToyEngine) -> Iterator[World]:
    """Engines of two ranks and of one, on a host each."""
    other = ToyEngine(model, 1, "engine 1")
    made = World(model, [engine, other])
    yield made
    made.close()
    other.close()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """One that outlives a channel."""
    monkeypatch.setenv("FAULTY_KEY", "k" * 32)
    return b"k" * 32


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)
