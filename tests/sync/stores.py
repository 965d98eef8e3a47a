"""Stores and file systems that fail on purpose."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slime.sync.manifest import Manifest, PartRef, root_of
from slime.sync.places import Busy, Missing, Store
from slime.sync.records import ModelSpec, TensorSpec
from slime.sync.store_local import Files

MODEL = ModelSpec((TensorSpec("a", (4,), "bfloat16"), TensorSpec("b", (2, 2), "float32")))
KEY = b"a key of 16 bytes"


def version(number: int, epoch: int = 0, run_id: str = "run", **values: Any) -> tuple[Manifest, list[bytes]]:
    """Version `number` and its two parts."""
    parts = [f"{epoch}/{number} part {i} ".encode() * 3 for i in range(2)]
    made = {
        "parent_epoch": epoch if number else -1,
        "parent_number": number - 1,
        "kind": "delta",
        "signature": MODEL.signature,
        "codec": "steps",
        "part_bytes": 1,
        "parts": tuple(PartRef.of(i, part) for i, part in enumerate(parts)),
        "fingerprints": (number + 1, 10 * epoch),
        "parent_root": root_of((number, 10 * epoch)),
        "changed": (1, 2),
    }
    return Manifest(run_id, epoch, number, **made | values), parts


class PowerLoss(Exception):
    """The machine is off."""


class VolatileFiles(Files):
    """A file system in memory that remembers what was made durable, and loses power before step `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.steps: list[str] = []
        self.dies_at = dies_at
        self.content: dict[int, bytes] = {}  # inode -> bytes
        self.synced: dict[int, bytes] = {}  # inode -> durable bytes
        self.names: dict[Path, int] = {}
        self.durable: dict[Path, int] = {}
        self.directories: set[Path] = {Path("/")}
        self.durable_directories: set[Path] = {Path("/")}

    def _step(self, what: str) -> None:
        if len(self.steps) == self.dies_at:
            raise PowerLoss(what)
        self.steps.append(what)

    def make_directory(self, path: Path) -> None:
        self._step(f"mkdir {path}")
        self.directories.add(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(f"write {path}")
        self.names[path] = inode = max(self.content, default=0) + 1
        self.content[inode] = data

    def sync(self, path: Path) -> None:
        self._step(f"fsync {path}")
        self.synced[self.names[path]] = self.content[self.names[path]]

    def rename(self, path: Path, to: Path) -> None:
        self._step(f"rename {path} {to}")
        self.names[to] = self.names.pop(path)

    def sync_directory(self, path: Path) -> None:
        self._step(f"fsync {path}/")
        for known in [p for p in list(self.durable) if p.parent == path]:
            self.durable.pop(known, None)
        self.durable |= {p: inode for p, inode in dict(self.names).items() if p.parent == path}
        self.durable_directories |= {p for p in self.directories if p.parent == path}

    def unlink(self, path: Path) -> None:
        self._step(f"unlink {path}")
        self.names.pop(path, None)

    def is_directory(self, path: Path) -> bool:
        return path in self.directories

    def is_file(self, path: Path) -> bool:
        return path in self.names

    def size(self, path: Path) -> int:
        return len(self.read(path))

    def read(self, path: Path) -> bytes:
        if path not in self.names:
            raise FileNotFoundError(path)
        return self.content[self.names[path]]

    def walk(self, path: Path) -> Iterator[Path]:
        yield from (p for p in self.names if path in p.parents)

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        yield

    def after(self, keeps: Callable[[str], bool], torn: Callable[[bytes], bytes]) -> "VolatileFiles":
        """What is found when power is back. Names and directories that were not made durable are there if `keeps` says so; bytes that were
        not are what `torn` makes of them."""
        found = VolatileFiles()
        found.directories = {p for p in self.directories if p in self.durable_directories or keeps(f"{p}/")}
        found.directories = {p for p in found.directories if all(above in found.directories for above in p.parents)}
        for path in self.names.keys() | self.durable.keys():
            now, then = self.names.get(path), self.durable.get(path)
            inode = now if now == then or keeps(str(path)) else then
            if inode is None or path.parent not in found.directories:
                continue
            found.names[path] = inode
            found.content[inode] = self.synced[inode] if inode in self.synced else torn(self.content[inode])
        found.durable, found.synced, found.durable_directories = dict(found.names), dict(found.content), set(found.directories)
        return found


class FullDisk(Files):
    """Has room for so many bytes; a write that finds none leaves a torn file, as disks do."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data[: self.room])
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.room -= len(data)


class Flaky(Store):
    """Another store, of which calls fail as told: `plan` gives the fate of each call by its number."""

    def __init__(self, store: Store, plan: Callable[[int, str, str], str]) -> None:
        """plan(call, method, name) -> "" | "503" | "404" | "lost" (done, but the answer is lost)."""
        self.where, self._store, self._plan, self.calls = store.where, store, plan, 0

    def _do(self, method: str, name: str, *rest: Any) -> Any:
        fate = self._plan(self.calls, method, name)
        self.calls += 1
        if fate == "503":
            raise Busy(f"{name}: 503 Slow Down")
        if fate == "404":
            raise Missing(f"{name}: 404")
        result = getattr(self._store, method)(name, *rest)
        if fate == "lost":
            raise Busy(f"{name}: connection reset")
        return result

    def put(self, name: str, data: bytes) -> None:
        self._do("put", name, data)

    def get(self, name: str, limit: int) -> bytes:
        return self._do("get", name, limit)

    def exists(self, name: str) -> bool:
        return self._do("exists", name)

    def list(self, prefix: str) -> "list[str]":
        return self._do("list", prefix)

    def delete(self, name: str) -> None:
        self._do("delete", name)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        return self._do("put_if", name, data, expected)
