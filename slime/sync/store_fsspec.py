"""URLs as stores of weights: s3://bucket/path and what speaks S3 (MinIO, Ceph, R2), memory:// for tests. `open_store` takes any of them.

An object appears whole when its upload ends, so a cut upload leaves nothing to be read, but room that only a lifecycle rule of the bucket
frees. The pointer is replaced by a conditional write (If-Match with the ETag that was read, If-None-Match where there was none). Where the
service is and who we are comes from the usual places: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ~/.aws, or the machine's role.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from slime.sync.places import Busy, Missing, Patient, Store, checked
from slime.sync.store_local import LocalStore

WAIT_S = 20.0  # for one answer; Patient asks again
BUSY_CODES = frozenset(
    ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "503", "500", "502", "504", "ConditionalRequestConflict", "409")
)
BUSY_ERRNOS = frozenset((errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE))


def open_store(url: str, timeout_s: float = 60.0) -> Patient:
    """The store of a directory or URL (sync.url), asked again while it is busy for at most `timeout_s`. Raises ValueError for a URL that
    cannot be used, naming what is missing."""
    scheme, _, rest = url.partition("://")
    if not rest:
        return Patient(LocalStore(Path(url)), timeout_s)
    if scheme == "file":
        return Patient(LocalStore(Path(rest)), timeout_s)
    if scheme == "memory":
        return Patient(MemoryStore(rest), timeout_s)
    if scheme == "s3":
        return Patient(S3Store(rest), timeout_s)
    raise ValueError(
        f"sync.url={url}: {scheme}:// has no conditional write here, without which two trainers overwrite one another; use a directory or "
        " s3:// (also of a service that speaks S3, by AWS_ENDPOINT_URL)"
    )


class FsspecStore(Store):
    """What all file systems of fsspec do alike."""

    def __init__(self, fs: Any, scheme: str, root: str) -> None:
        self.where = f"{scheme}://{root.rstrip('/')}"
        self._fs, self._root = fs, root.strip("/")

    def put(self, name: str, data: bytes) -> None:
        with self._errors(name):
            self._fs.pipe_file(self._path(name), data)

    def get(self, name: str, limit: int) -> bytes:
        with self._errors(name):
            size = self._fs.info(self._path(name))["size"]
            if size > limit:
                raise ValueError(f"{self.where}/{name}: has {size} bytes, at most {limit} are expected")
            return self._fs.cat_file(self._path(name))

    def exists(self, name: str) -> bool:
        try:
            with self._errors(name):
                self._fs.info(self._path(name))
                return True
        except Missing:
            return False

    def list(self, prefix: str) -> "list[str]":
        with self._errors(prefix):
            found = self._fs.find(self._path(prefix) if prefix else self._root)
        return sorted(path.strip("/").removeprefix(f"{self._root}/") for path in found)

    def delete(self, name: str) -> None:
        try:
            with self._errors(name):
                self._fs.rm_file(self._path(name))
        except Missing:
            return

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked(name)}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Errors of the service as those of `Store`."""
        try:
            yield
        except FileNotFoundError as error:
            raise Missing(f"{self.where}/{name}: not there ({error})") from error
        except TimeoutError as error:
            raise Busy(f"{self.where}/{name}: no answer in {WAIT_S:g} s") from error
        except OSError as error:
            if isinstance(error, ConnectionError) or error.errno in BUSY_ERRNOS:
                raise Busy(f"{self.where}/{name}: {error}") from error
            raise


class MemoryStore(FsspecStore):
    """In this process's memory."""

    _lock = threading.Lock()

    def __init__(self, root: str) -> None:
        super().__init__(MemoryFileSystem(), "memory", root)

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        with self._lock:
            found = self._fs.cat_file(self._path(name)) if self.exists(name) else None
            if found == expected:
                self.put(name, data)
            return found == expected


class S3Store(FsspecStore):
    """A bucket, or a folder of one."""

    def __init__(self, root: str) -> None:
        """`root` is bucket/path. Raises ValueError where s3fs is not installed."""
        try:
            import botocore.exceptions

            fs = fsspec.filesystem(
                "s3",
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={"connect_timeout": WAIT_S, "read_timeout": WAIT_S, "retries": {"total_max_attempts": 1}},
            )
        except ImportError as error:
            raise ValueError(f"sync.url=s3://{root}: {error}; pip install 'slime-rl[s3]'") from error
        fs.retries = 1  # Patient asks again
        super().__init__(fs, "s3", root)
        self._client_error, self._connection_errors = botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError

    def put_if(self, name: str, data: bytes, expected: bytes | None) -> bool:
        path = self._path(name)
        condition = {"IfNoneMatch": "*"}
        try:
            with self._errors(name):
                if expected is not None:
                    condition = {"IfMatch": self._fs.info(path)["ETag"]}  # before the bytes: if they change in between, nothing is written
                    if self._fs.cat_file(path) != expected:
                        return False
                bucket, _, key = path.partition("/")
                self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
                return True
        except Missing:
            return False
        except OSError as error:
            if self._code(error) in ("PreconditionFailed", "412"):
                return False
            raise

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            with super()._errors(name):
                yield
        except OSError as error:
            if not isinstance(error, Busy) and self._code(error) in BUSY_CODES:
                raise Busy(f"{self.where}/{name}: {error}") from error
            raise
        except self._connection_errors as error:
            raise Busy(f"{self.where}/{name}: {error}") from error

    def _code(self, error: BaseException) -> str:
        """S3's word for an error; "" of another."""
        cause = error if isinstance(error, self._client_error) else error.__cause__
        return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, self._client_error) else ""
