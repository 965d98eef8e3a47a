"""A `Store`: named bytes, at a place that may be busy. `store_local.py` and `store_fsspec.py` are the places that there are."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

SMALL = 1 << 16  # bytes, more than a pointer or a lease has
T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


class Missing(ValueError):
    """No such file, or not yet."""


class Busy(OSError):
    """The place does not answer now; asking again may help."""


class Store(ABC):
    """Named bytes; names are relative, with "/" between folders. Methods raise Busy where asking again may help, else other OSErrors."""

    where: str  # directory or URL, for errors

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Write a file whole and durably, or not at all. One that is there is replaced: use it for names that tell their content."""

    @abstractmethod
    def get(self, name: str, limit: int) -> bytes:
        """A file's bytes. Raises Missing, and ValueError where it has more than `limit` bytes, which are then not read."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str) -> "list[str]":
        """Names below a folder, "" for all, sorted; may lack new ones and have deleted ones."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Of a file that is not there: nothing."""

    @abstractmethod
    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """Write a file if it holds `expected` now (None: if it is not there), in one step that no other writer divides. Returns whether."""


def checked(name: str) -> str:
    """The name. Raises ValueError for one that could lead elsewhere."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: not the name of a file in a store")
    return name


class Patient(Store):
    """Another store, asked again while it is busy: at most `tries` times and `timeout_s` seconds."""

    def __init__(
        self,
        store: Store,
        timeout_s: float = 60.0,
        tries: int = 8,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.where = store.where
        self._store, self._timeout_s, self._tries, self._clock, self._sleep = store, timeout_s, tries, clock, sleep
        self._ends = float("inf")

    @contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Nothing is asked again after so many seconds from now, however many calls there are."""
        self._ends = self._clock() + timeout_s
        try:
            yield
        finally:
            self._ends = float("inf")

    def put(self, name: str, data: bytes) -> None:
        self._again(f"write {name}", lambda: self._store.put(name, data))

    def get(self, name: str, limit: int) -> bytes:
        return self._again(f"read {name}", lambda: self._store.get(name, limit))

    def get_soon(self, name: str, limit: int) -> bytes:
        """A file that is said to be there, though it may not show at once. Raises Missing after the deadline."""
        return self._again(f"read {name}", lambda: self._store.get(name, limit), (Busy, Missing))

    def exists(self, name: str) -> bool:
        return self._again(f"look for {name}", lambda: self._store.exists(name))

    def list(self, prefix: str) -> "list[str]":
        return self._again(f"list {prefix}", lambda: self._store.list(prefix))

    def delete(self, name: str) -> None:
        self._again(f"delete {name}", lambda: self._store.delete(name))

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        """An answer may be lost though the write was done: where the file then holds `data`, it was ours (data is unique to its writer)."""
        if self._again(f"write {name}", lambda: self._store.put_if(name, data, expected)):
            return True
        try:
            return self.get(name, max(len(data), SMALL)) == data
        except Missing:
            return False

    def _again(self, what: str, call: Callable[[], T], errors: tuple[type[Exception], ...] = (Busy,)) -> T:
        ends, wait = min(self._clock() + self._timeout_s, self._ends), 0.05
        for tried in range(1, self._tries + 1):
            try:
                return call()
            except errors as error:
                if tried == self._tries or self._clock() + wait > ends:
                    said = f"{self.where}: cannot {what}: {error} ({tried} tries, at most {self._timeout_s:g} s)"
                    raise (Missing(said) if isinstance(error, Missing) else Busy(said)) from error
                self._sleep(wait)
                wait = min(2 * wait, 5.0)
        raise AssertionError("the last try returns or raises")
