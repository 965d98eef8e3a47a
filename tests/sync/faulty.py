"""Faults for the weight channel: agents that are killed at a point, hosts that do not answer, connections that delay and drop."""

import asyncio
import contextlib
import inspect
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slime.cluster.deadline import ProcessLost
from slime.config import SlimeConfig
from slime.engine.actions import Actions
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.live import LiveEngine
from slime.engine.weights import HostWeights
from slime.sync.channel import Channel
from slime.sync.inserver_client import RankClient
from slime.sync.protocol import Adoption, Answer
from slime.sync.publication import Action, Do
from slime.sync.records import ModelSpec
from slime.sync.staging import Stage
from slime.types import WeightVersion
from tests.engine.weights_double import Bits, Host

RUN_ID = "run"
GRACE_S = 15.0  # beyond an agent's own deadline


def recipe(model: Path, ranks: int, timeout_s: float = 30.0, **sync: Any) -> SlimeConfig:
    cfg = SlimeConfig()
    cfg.model.path, cfg.model.dtype, cfg.rollout.tensor_parallel = str(model), "bf16", ranks
    cfg.sync.timeout_s, cfg.sync.bucket_mb = timeout_s, 1
    for name, value in sync.items():
        setattr(cfg.sync, name, value)
    return cfg


def open_channel(cfg: SlimeConfig, trainer: Bits, hosts: Any, epoch: int = 0, run_id: str = RUN_ID, where: Path = Path("none")) -> Channel:
    """Opened: every engine is proven to hold the model directory."""
    channel = Channel(cfg.sync, trainer, hosts, WeightVersion(epoch, 0, run_id), where)
    channel.open()
    return channel


class Fleet:
    """Several hosts as the driver sees them, with the deadlines of engine/fleet.py; sync.protocol.Receivers."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)
        self.dead: set[int] = set()  # hosts whose agent is gone
        self.lost: Callable[[Action], bool] = lambda action: False  # whether an answer is lost on its way
        self.tamper: Callable[[str, list[bytes]], tuple[str, list[bytes]]] = lambda manifest, parts: (manifest, parts)
        self.offered: list[tuple[str, list[bytes]]] = []  # manifests and parts, as they were published

    def _all(self, call: Callable[[Host], Any]) -> list[Any]:
        if self.dead:
            raise RuntimeError("waiting for every host: a process died or was lost")
        return [call(host) for host in self.hosts]

    def adopt(self, spec: ModelSpec, run: Adoption, timeout_s: float) -> None:
        self._all(lambda host: host.adopt(spec, run, timeout_s))

    def engines(self) -> list[str]:
        return [name for host in self.hosts for name in host.engines()]

    def offer(self, manifest: str, parts: Any, timeout_s: float) -> None:
        self.offered.append((manifest, list(parts)))
        manifest, parts = self.tamper(manifest, list(parts))
        self._all(lambda host: host.offer(manifest, parts, timeout_s))

    def perform(self, actions: Sequence[Action], label: str, timeout_s: float) -> list[Answer]:
        until = time.monotonic() + timeout_s
        asked = []
        for number, host in enumerate(self.hosts):
            names = {engine.endpoint.name for engine in host.live}
            if mine := [action for action in actions if action.engine in names]:
                host.before(mine)
                gone = number in self.dead
                performed = None if gone else host.weights.perform(mine, label, timeout_s)
                asked.append((mine, performed and asyncio.run_coroutine_threadsafe(performed, host._loop)))
        answers: list[Answer] = []
        for mine, future in asked:
            what = f"{', '.join(a.engine for a in mine)} to {mine[0].do} weights {label}"
            if future is None:
                raise ProcessLost(f"waiting for {what}: a process died or was lost")
            try:
                answers += future.result(max(0.1, until - time.monotonic()) + GRACE_S)
            except TimeoutError:
                answers += [Answer(a, f"waiting for {what}: nothing after {timeout_s:g} s (sync.timeout_s)") for a in mine]
            except RuntimeError as error:
                answers += [Answer(a, str(error)) for a in mine]
        return [Answer(a.action, "the answer was lost") if self.lost(a.action) else a for a in answers]

    def advance(self, label: str, timeout_s: float) -> None:
        self._all(lambda host: host.advance(label, timeout_s))

    def give_up(self, label: str, timeout_s: float) -> None:
        self._all(lambda host: host.give_up(label, timeout_s))

    def write_anchor(self, manifest: str) -> None:
        self.hosts[0].run(self.hosts[0].weights.write_anchor(manifest))

    def offer_bucket(self, bucket: Any, first: bool, timeout_s: float) -> int:
        return sum(self._all(lambda host: host.offer_bucket(bucket, first, timeout_s)))

    def offer_whole(self, label: str, timeout_s: float) -> None:
        self._all(lambda host: host.offer_whole(label, timeout_s))

    def relabel(self, label: str, timeout_s: float) -> None:
        self._all(lambda host: host.relabel(label, timeout_s))


# --- an agent that is killed ------------------------------------------------------------------------------------------

# What the agent does last: (owner, method, whether the method has ended by then)
POINTS: dict[str, tuple[Any, str, bool]] = {
    "the staged file is half there": (os, "replace", False),
    "the staged file is there": (Stage, "write", True),
    "a rank has staged": (RankClient, "stage", True),
    "all have staged": (LiveEngine, "stage", True),
    "paused": (LiveEngine, "pause", True),
    "the session is open": (Control, "begin", True),
    "the commit is sent": (Control, "update", False),
    "written": (Control, "update", True),
    "the session is closed": (Control, "end", True),
    "proven": (Actions, "_commit", True),
    "going on": (Actions, "_resume", True),
    "the host copy follows": (HostWeights, "advance", False),
    "undone": (Actions, "_undo", True),
}


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(owner: Any, name: str, ended: bool) -> None:
    """The process is killed at the point."""
    do = getattr(owner, name)

    async def later(*args: Any, **kwargs: Any) -> Any:
        task = asyncio.ensure_future(do(*args, **kwargs))
        if ended:
            await task
        elif name == "update":
            await asyncio.wait([task], timeout=0.1)  # the request is on its way
        die()

    def now(*args: Any, **kwargs: Any) -> Any:
        if ended:
            do(*args, **kwargs)
        die()

    setattr(owner, name, later if inspect.iscoroutinefunction(do) else now)


def _doomed(cfg: SlimeConfig, endpoint: Endpoint, point: str) -> None:
    """A driver and its agent: the base, version 0, and of version 1 as much as comes before the point."""
    server: Any = SimpleNamespace(spec=SimpleNamespace(endpoint=endpoint, log=Path("log")), alive=True, tail=lambda: "")
    trainer, fleet = Bits(Path(cfg.model.path)), Fleet([Host(cfg, [server])])
    channel = open_channel(cfg, trainer, fleet)
    trainer.mutate(1, 0.1)
    channel.publish(0)
    _arm(*POINTS[point])
    fleet.lost = lambda action: point == "undone" and action.do is Do.COMMIT
    trainer.mutate(2, 0.1)
    channel.publish(1)
    os._exit(3)  # the point was not reached


def kill_an_agent(cfg: SlimeConfig, endpoint: Endpoint, point: str, timeout_s: float = 60.0) -> None:
    """Runs until the agent is killed at the point."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sync.faulty"])
    process = context.Process(target=_doomed, args=(cfg, endpoint, point))
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == -signal.SIGKILL, f"{point}: the agent ended with {process.exitcode}"


# --- a connection that is not what it should be -----------------------------------------------------------------------


class Proxy:
    """Passes connections on. `rule(data, answer)` is asked of every piece of data, of what is asked and what is answered: seconds to wait
    before it goes on, or None to break the connection instead."""

    def __init__(self, target: str, path: Path | None = None) -> None:
        """To a TCP address host:port, or from a unix socket `path` to another."""
        self.rule: Callable[[bytes, bool], float | None] = lambda data, answer: 0.0
        self.seen = 0  # connections
        self.target, self._path = target, path
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _listen(self) -> asyncio.Server:
        if self._path is not None:
            return await asyncio.start_unix_server(self._accept, str(self._path))
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen += 1
        if self._path is not None:
            onward, out = await asyncio.open_unix_connection(self.target)
        else:
            host, _, port = self.target.rpartition(":")
            onward, out = await asyncio.open_connection(host, int(port))
        ways = [asyncio.ensure_future(self._pass(reader, out, False)), asyncio.ensure_future(self._pass(onward, writer, True))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, out):
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                wait = self.rule(data, answer)
                if wait is None:
                    return
                await asyncio.sleep(wait)
                writer.write(data)
                await writer.drain()
