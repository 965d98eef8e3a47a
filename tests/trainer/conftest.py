import pytest

from tests.tiny import make_tiny
from tests.trainer.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Real processes, as many as the largest layout that a test asks for."""
    pool = Ranks(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny model directories by kind."""
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_tiny(root / "qwen3", "qwen3", vocab=77),  # padded to 80
        "qwen3_tied": make_tiny(root / "qwen3_tied", "qwen3", tied=True, vocab=77, seed=1),
        "llama": make_tiny(root / "llama", "llama", seed=2),
    }
