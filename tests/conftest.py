"""What holds for every test."""

import gc
import re
from pathlib import Path

import pytest

E2E_ALONE = re.compile(r"^pytestmark = .*\bpytest\.mark\.e2e\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where no e2e test runs, a file of nothing else need not be imported to find that out."""
    if collection_path.suffix != ".py" or "not e2e" not in config.getoption("markexpr"):
        return None
    return True if E2E_ALONE.search(collection_path.read_text()) else None


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage, again and again, takes time."""
    gc.collect()
    gc.freeze()
