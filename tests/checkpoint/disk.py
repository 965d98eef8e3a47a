"""A disk that fails at one chosen operation: what a save asks of it, counted and interposed.

    with Disk(folder).installed() as disk: save()                 # disk.operations: what the save did, in order
    with Disk(folder, at=17, kind="stop").installed(): save()     # its 18th operation goes wrong

An operation is a write to a file that is opened below the folder, or a call of os.fsync, rename, replace, mkdir, unlink, remove or rmdir.
"""

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir")
OF_WRITES = ("truncate", "flip low", "flip high")  # the disk does them and says that all is well
OF_ALL = ("fail", "full", "stop")  # EIO once, ENOSPC from there on, the process ends
KINDS = (*OF_ALL, *OF_WRITES)


class Killed(BaseException):
    """The process ends here: neither this nor anything after it happens."""


class Disk:
    def __init__(self, root: Path, at: int = -1, kind: str = "") -> None:
        self.root, self.at, self.kind = root, at, kind
        self.operations: list[str] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator["Disk"]:
        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(mock.patch.object(os, name, self._calling(name, getattr(os, name))))
            for module in (builtins, io):
                stack.enter_context(mock.patch.object(module, "open", self._opening(open)))
            yield self

    def meet(self, operation: str) -> str:
        """Count an operation; what shall become of a write ("" for nothing)."""
        number = len(self.operations)
        self.operations.append(operation)
        if number > self.at >= 0 and self.kind == "stop":
            raise Killed
        if number > self.at >= 0 and self.kind == "full" and not operation.startswith(("unlink", "remove", "rmdir", "fsync")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != self.at:
            return ""
        if self.kind == "stop":
            raise Killed
        if self.kind in OF_ALL:
            code = errno.EIO if self.kind == "fail" else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        return self.kind

    def _calling(self, name: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.meet(f"{name} {Path(args[0]).name if not isinstance(args[0], int) else ''}")
            return function(*args, **kwargs)

        return called

    def _opening(self, function: Any) -> Any:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = set(mode) & set("wax+") and not isinstance(file, int) and Path(file).is_relative_to(self.root)
            stream = function(file, mode, *args, **kwargs)
            return _Stream(stream, self, Path(file).name) if writes else stream

        return opened


class _Stream:
    """A file that is open for writing."""

    def __init__(self, stream: Any, disk: Disk, name: str) -> None:
        self._stream, self._disk, self._name = stream, disk, name

    def write(self, data: Any) -> int:
        fault = self._disk.meet(f"write {self._name}")
        content = memoryview(data).tobytes()
        if fault == "truncate":
            self._stream.write(content[: len(content) // 2])
        elif fault:
            middle = len(content) // 2
            bit = 1 if fault == "flip low" else 128
            self._stream.write(content[:middle] + bytes([content[middle] ^ bit]) + content[middle + 1 :])
        else:
            self._stream.write(content)
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
