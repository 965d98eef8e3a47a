"""One SGLang server: a process group that starts with a deadline and never outlives its parent (see guard.py)."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, NotStarted
from slime.engine.ports import is_free

LOADED = "loaded"  # what a server of ours calls the weights that it has read from model.path: <run_id>/loaded
POLL_S = 0.1
STOP_S = 10.0  # after which a killed group must be gone
TAIL_LINES = 20
OCCUPIED = ("address already in use", "is not available", "Errno 98")


@dataclass(frozen=True)
class ServerSpec:
    """What to start. `words` are SGLang's command-line words without address and keys; `label` names the weights that it loads."""

    endpoint: Endpoint
    python: str
    words: list[str]
    environment: dict[str, str] = field(repr=False)
    label: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.endpoint.url.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)


class Server:
    """A started server. `stop` must be called, or this process must end."""

    def __init__(self, spec: ServerSpec) -> None:
        """Starts the process. Raises NotStarted where the port is occupied, ValueError where the interpreter cannot be run."""
        self.spec = spec
        host, port = spec.address
        if not is_free(host, port):
            raise self._occupied()
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        # A file of mode 0600 keeps the keys out of the process list; it is removed once the server has read it.
        self._keys = tempfile.NamedTemporaryFile("w", prefix="slime-engine-", suffix=".yaml")  # noqa: SIM115
        json.dump({"api-key": spec.endpoint.key, "admin-api-key": spec.endpoint.key}, self._keys)
        self._keys.flush()
        self._guard = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        started = {"command": self._command(), "environment": spec.environment, "log": str(spec.log), "secrets": [spec.endpoint.key]}
        self._guard.stdin.write(json.dumps(started).encode() + b"\n")
        self._guard.stdin.flush()

    def _command(self) -> list[str]:
        host, port = self.spec.address
        own = ["--host", host, "--port", str(port), "--weight-version", self.spec.label, "--config", self._keys.name]
        return [self.spec.python, "-m", "sglang.launch_server", *self.spec.words, *own]

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    async def ready(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        """Wait until the server answers with the label of its weights.

        Raises NotStarted with the log's tail when its process ends first, TimeoutError naming rollout.start_timeout_s. The server is
        stopped then.
        """
        control, deadline = Control(self.spec.endpoint, session), time.monotonic() + timeout_s
        try:
            while True:
                if not self.alive:
                    raise self._ended()
                with contextlib.suppress(EngineError, TimeoutError):  # not listening yet
                    if await control.label() == self.spec.label:
                        break
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"waiting for {self.spec.endpoint.name} to start: not healthy after {timeout_s:g} s (rollout.start_timeout_s); "
                        f"the end of {self.spec.log}:\n{self.tail()}"
                    )
                await asyncio.sleep(POLL_S)
            await control.freeze_gc()
        except BaseException:
            self.stop()
            raise
        self._keys.close()

    def _ended(self) -> NotStarted:
        tail = self.tail()
        if any(sign in tail for sign in OCCUPIED) and str(self.spec.address[1]) in tail:
            return self._occupied()
        code = self._guard.returncode
        return NotStarted(f"{self.spec.endpoint.name} ended with exit code {code} while it started; the end of {self.spec.log}:\n{tail}")

    def _occupied(self) -> NotStarted:
        host, port = self.spec.address
        return NotStarted(f"{self.spec.endpoint.name}: port {port} of {host} is taken by another process; start again to get another port")

    def tail(self) -> str:
        """The last lines of the log."""
        if not self.spec.log.exists():
            return "(empty)"
        with open(self.spec.log, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 16384))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-TAIL_LINES:]) or "(empty)"

    def stop(self) -> None:
        """Kill the server's group, stopped processes too, and wait until it is gone. May be called again."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.send_signal(signal.SIGCONT)  # a guard that was stopped hears it now
        try:
            self._guard.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._guard.send_signal(signal.SIGKILL)
            self._guard.wait()
        if not self._keys.closed:
            self._keys.close()
