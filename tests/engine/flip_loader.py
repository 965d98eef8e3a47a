"""A custom SGLang weight loader for tests: a thread of every rank that flips bits of the live model, or dumps it, unknown to the channel.

The update that starts it is one empty tensor named by a path; each rank listens at `<path>.<rank>`. Everything is done on storages, byte
by byte, so that what lies beyond a parameter's own elements (padding, buffers) is reached too.
"""

import threading
from collections.abc import Iterable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime.sync.inserver_lives import LiveTensors

LOADER = "tests.engine.flip_loader.load"
Storages = dict[str, torch.Tensor]  # uint8 [bytes]


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's hook."""
    path = next(iter(named_tensors))[0]
    rank = torch.distributed.get_rank()
    listener = Listener(f"{path}.{rank}", "AF_UNIX")
    threading.Thread(target=_serve, args=(listener, model), daemon=True).start()


def _serve(listener: Listener, model: Any) -> None:
    while True:
        with listener.accept() as client:
            try:
                while True:
                    do, *arguments = client.recv()
                    client.send({"dump": _dump, "flip": _flip, "scramble": _scramble}[do](_storages(model), *arguments))
            except EOFError:
                continue


def _storages(model: Any) -> Storages:
    """The bytes of every storage, by the name that the live map gives it; views."""
    lives = LiveTensors(model)
    return {
        live.name: torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        for live, tensor in zip(lives.lives, lives._tensors, strict=True)
    }


def _dump(storages: Storages) -> dict[str, np.ndarray]:
    return {name: storage.cpu().numpy().copy() for name, storage in storages.items()}


def _flip(storages: Storages, name: str, byte: int, bit: int) -> None:
    storages[name][byte] ^= 1 << bit


def _scramble(storages: Storages, name: str, start: int, end: int) -> None:
    storages[name][start:end] ^= 0xA5


class Flipper:
    """The test's end of one rank's thread."""

    def __init__(self, path: Path, rank: int) -> None:
        self._link: Connection = Client(f"{path}.{rank}", "AF_UNIX")

    def dump(self) -> dict[str, np.ndarray]:
        """uint8 [bytes] of every storage, by name."""
        return self._ask("dump")

    def flip(self, name: str, byte: int, bit: int) -> None:
        self._ask("flip", name, byte, bit)

    def scramble(self, name: str, start: int, end: int) -> None:
        """Give bytes [start, end) other values."""
        self._ask("scramble", name, start, end)

    def close(self) -> None:
        self._link.close()

    def _ask(self, *message: Any) -> Any:
        self._link.send(message)
        assert self._link.poll(30), "the rank does not answer"
        return self._link.recv()
