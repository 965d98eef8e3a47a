"""What holds for every test."""

import gc


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage, again and again, takes time."""
    gc.collect()
    gc.freeze()
