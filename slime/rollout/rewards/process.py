"""One reward worker as the rollout manager sees it: started, asked, killed."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from slime.config import RewardConfig
from slime.rollout.rewards.verdict import Verdict
from slime.rollout.rewards.wire import frame, receive
from slime.types import Sample

START_S = 60.0  # for a worker to import the reward function


class WorkerLost(Exception):
    """The worker ended while it judged; the text says how."""


class Worker:
    """A process that judges. It is started when it is first asked, and again after it ended."""

    def __init__(self, cfg: RewardConfig, knob: str) -> None:
        """`knob` is where the recipe names the function."""
        self._cfg, self._knob = cfg, knob
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, asyncio.Future[list[Verdict]]] = {}
        self._numbers = 0
        self._starting = asyncio.Lock()
        self._replies: asyncio.Task[None] | None = None
        self.is_async = False

    @property
    def load(self) -> int:
        """Judgements under way."""
        return len(self._waiting)

    @property
    def _running(self) -> bool:
        return self._replies is not None and not self._replies.done()

    async def start(self) -> None:
        """Start it where it does not run. Raises ValueError naming the knob of a function that cannot be loaded."""
        if self._running:
            return
        async with self._starting:
            if not self._running:
                await self._start()

    async def judge(self, samples: list[Sample]) -> list[Verdict]:
        """The verdicts of one judgement. Raises WorkerLost where the process ended meanwhile."""
        await self.start()
        self._numbers += 1
        future = self._waiting[self._numbers] = asyncio.get_running_loop().create_future()
        number = self._numbers
        try:
            self._writer.write(frame((number, samples)))
            return await future
        finally:
            self._waiting.pop(number, None)

    async def kill(self) -> None:
        """End the process and its group; judgements under way are lost."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._exit_code()
        if self._replies is not None:
            await self._replies

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "slime.rollout.rewards.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:  # started from this thread, which lives as long as the manager: the kernel takes the thread for the parent
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.write(frame((self._cfg, self._knob)))
        try:
            async with asyncio.timeout(START_S):
                said, detail = await receive(reader)
        except TimeoutError as error:
            await self.kill()
            raise ValueError(f"{self._knob}={self._cfg.fn}: its module was not imported within {START_S:g} s") from error
        except EOFError as error:
            raise ValueError(f"{self._knob}={self._cfg.fn}: the process that imports it {await self._ending()}") from error
        if said == "failed":
            await self._exit_code()
            raise ValueError(detail)
        self.is_async = detail
        self._replies = asyncio.create_task(self._read_replies(reader))

    async def _read_replies(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, verdicts = await receive(reader)
                future = self._waiting.pop(number, None)
                if future is not None and not future.done():  # nobody waits for a judgement that was cancelled
                    future.set_result(verdicts)
        except EOFError:
            ending = await self._ending()
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(WorkerLost(ending))

    async def _exit_code(self) -> int:
        """Wait for the process to end, and end what a reward function started in it and left."""
        assert self._process is not None
        return await asyncio.to_thread(_wait_for_group, self._process)

    async def _ending(self) -> str:
        code = await self._exit_code()
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _wait_for_group(process: subprocess.Popen[bytes]) -> int:
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # another thread was first
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it keeps its id, which is the group's, until it is waited for
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _environment() -> dict[str, str]:
    """What this process can import, its workers can; a judgement is one thread's work."""
    here: dict[str, Any] = {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **here}
