"""The host agent: a Ray actor, one a host, that runs the SGLang servers of its host and alone gives them weights."""

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import aiohttp
import ray

from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.engine import arguments, settings, swapping
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, NotStarted
from slime.engine.fraction import beside_rank
from slime.engine.health import Trouble, Turn
from slime.engine.live import LiveEngine
from slime.engine.ports import free_ports
from slime.engine.server import LOADED, Server, ServerSpec
from slime.engine.tending import Tending
from slime.engine.versions import facts
from slime.models.registry import has_experts
from slime.sync.protocol import Adoption, Answer, Bucket
from slime.sync.publication import Action

if TYPE_CHECKING:
    from slime.engine.weights import HostWeights

T = TypeVar("T")
WEIGHTS = "slime.engine.weights"  # imports torch, for seconds in which calls are to be answered


@dataclass(frozen=True)
class Assignment:
    """One server of a host: its number in the run, and the GPUs it may see (none on a CPU)."""

    index: int
    gpus: tuple[int, ...]


class EngineActor:
    """Runs on the host of its servers. They end when this process does.

    It keeps the tensors of the committed version in host memory: a restarted server is brought to them, proven, before it gets requests.
    """

    def __init__(self, cfg: SlimeConfig, run_dir: str, run_id: str, key: str, called: str = "engine") -> None:
        """`key` is the API and admin key of the run's servers, or of the user's; they are `called` engine 0, engine 1, ..."""
        self._cfg, self._run_dir, self._key, self._called = cfg, Path(run_dir), key, called
        self._loaded_label = f"{run_id}/{LOADED}"  # weights that a server read from model.path
        self._labelled: str | None = None  # what the engines were told to call what they loaded themselves
        self._tending = Tending(cfg.rollout, self._bring, self._start_anew)
        self._joining = asyncio.Lock()

    @cached_property
    def _weights(self) -> "HostWeights":
        """Needs torch, which takes seconds to import: not in the driver, which knows this class too, and here while servers start."""
        from slime.engine.weights import HostWeights

        return HostWeights(self._cfg, lambda: self._tending.engines)

    # --- starting -------------------------------------------------------------------------------------------------

    async def start(self, assignments: Sequence[Assignment], device: settings.Device, cpus: float) -> list[Endpoint]:
        """Start the servers side by side; all answer when this returns.

        Raises ValueError for a model or argument that cannot be used, NotStarted with a log's tail for a server that ended, TimeoutError
        after rollout.start_timeout_s. Nothing is left running then.
        """
        self._session = open_session()
        self._check_model()
        known = await asyncio.to_thread(arguments.known_arguments, self._cfg.rollout.engine_python)
        arguments.check(self._cfg.rollout.sglang, known)
        facts(known.version)
        chosen = settings.server_arguments(self._cfg, device)
        environment = settings.server_environment(self._cfg, device, cpus)
        host = ray.util.get_node_ip_address()
        ports = free_ports(host, 2 * len(assignments))
        try:
            for a in assignments:
                port, nccl_port = ports.pop(), ports.pop()
                spec = ServerSpec(
                    endpoint=Endpoint(f"http://{host}:{port}", self._key, f"{self._called} {a.index}", known.version),
                    python=self._cfg.rollout.engine_python or arguments.this_python(),
                    words=arguments.command_line(chosen | {"nccl_port": nccl_port}, known),
                    environment=environment | ({"CUDA_VISIBLE_DEVICES": ",".join(map(str, a.gpus))} if a.gpus else {}),
                    label=self._loaded_label,
                    log=self._run_dir / "logs" / f"{self._called.replace(' ', '_')}_{a.index}.log",
                )
                self._tending.add(self._live(spec))
            await asyncio.gather(self._every(self._ready), asyncio.to_thread(importlib.import_module, WEIGHTS))
        except BaseException:
            await self.stop()
            raise
        return self.endpoints()

    async def attach(self, urls: Sequence[str]) -> list[Endpoint]:
        """Use servers that the user started. Raises PreflightError where one does not answer, or not as the recipe needs, ValueError for an
        SGLang that is too old."""
        self._session = open_session()
        await asyncio.to_thread(importlib.import_module, WEIGHTS)
        for i, url in enumerate(urls):
            self._tending.add(await self._attached(Endpoint(url.rstrip("/"), self._key, f"engine {i}", ""), "rollout.external_urls"))
        return self.endpoints()

    async def join(self, url: str, key: str, name: str) -> Endpoint:
        """Use one more server of the user's: it is brought to the committed version, proven. Raises what `attach` raises, and ValueError,
        EngineError, RankError or TimeoutError where it does not come to hold that version."""
        async with self._joining:
            if name not in self._names():  # else an earlier call ended after its caller had given up
                engine = await self._attached(Endpoint(url.rstrip("/"), key, name, ""), "rollout.join")
                await self._weights.take_in(engine)
                self._tending.add(engine)
                self._tending.proven([name])
        return next(known.endpoint for known in self._tending.engines if known.endpoint.name == name)

    async def _attached(self, endpoint: Endpoint, knob: str) -> LiveEngine:
        name, url = endpoint.name, endpoint.url
        try:
            info = await Control(replace(endpoint, name=f"{name} ({knob})"), self._session).info()
        except (EngineError, EngineLost, TimeoutError) as error:
            raise PreflightError(f"{error}; start the server, or correct the url or rollout.external_key_env") from error
        if self._cfg.rollout.replay_experts and has_experts(self._cfg.model) and not info.get("enable_return_routed_experts"):
            raise PreflightError(
                f"{name} ({knob}) at {url} does not say which experts tokens go to: start it with --enable-return-routed-experts, or set "
                "rollout.replay_experts=false"
            )
        if settings.LOADER not in (info.get("custom_weight_loader") or []):
            raise PreflightError(
                f"{name} ({knob}) at {url} cannot prove what it holds: start it on this host with --custom-weight-loader {settings.LOADER} "
                "and slime on its PYTHONPATH"
            )
        return LiveEngine(replace(endpoint, sglang=info["version"]), info["tp_size"], self._session)

    def endpoints(self) -> list[Endpoint]:
        return [engine.endpoint for engine in self._tending.engines]

    # --- weights: see HostWeights and sync/protocol.py ------------------------------------------------------------

    async def adopt(self, spec_json: str, run: Adoption) -> list[str]:
        """Take the model directory as base; every engine is proven to hold it. Returns what a user should be warned of."""
        self._labelled = None
        with self._tending.at_work(self._names()):
            await self._weights.adopt(spec_json, run)
        self._tending.proven(self._names())
        return self._weights.warnings

    async def live(self) -> list[str]:
        """Names of the engines that take part in updates."""
        return [engine.endpoint.name for engine in self._weights.live()]

    async def offer(self, manifest: str, *parts: bytes) -> None:
        await self._weights.offer(manifest, parts)

    async def offer_bucket(self, bucket: Bucket, first: bool) -> int:
        return await self._weights.offer_bucket(bucket, first)

    async def offer_whole(self, label: str) -> None:
        await self._weights.offer_whole(label)

    async def perform(self, actions: list[Action], label: str, timeout_s: float) -> list[Answer]:
        with self._tending.at_work({action.engine for action in actions}):
            return await self._weights.perform(actions, label, timeout_s)

    async def advance(self, label: str) -> str:
        failed = await self._weights.advance(label)
        self._tending.published()
        return failed

    async def give_up(self, label: str) -> None:
        await self._weights.give_up(label)

    async def write_anchor(self, manifest: str) -> None:
        await self._weights.write_anchor(manifest)

    async def relabel(self, label: str) -> None:
        """Call the weights that the engines loaded themselves `label`."""
        with self._tending.at_work(self._names()):
            await self._every(lambda e: e.relabel(label))
        self._labelled = label
        self._tending.proven(self._names())

    # --- memory: see swapping.py ----------------------------------------------------------------------------------

    async def leave(self, timeout_s: float) -> None:
        """No engine of this host has memory of its devices when this returns, nor will before `enter`."""
        await swapping.leave(self._tending, timeout_s, self._cfg.rollout.health_timeout_s)

    async def enter(self, timeout_s: float) -> None:
        """Engines have their memory, and hold the host's version, proven; those that do not are started anew."""
        await swapping.enter(self._tending, timeout_s)

    # --- health: see tending.py -----------------------------------------------------------------------------------

    async def health(self, since: int, wait_s: float) -> tuple[int, list[Turn]]:
        """Turns of this host's engines from number `since` on, and the number to ask for next; waits up to `wait_s` for the first."""
        return await self._tending.news(since, wait_s)

    async def report(self, troubles: list[Trouble]) -> None:
        """What clients saw of this host's engines."""
        self._tending.report(troubles)

    async def _start_anew(self, spec: ServerSpec) -> LiveEngine:
        engine = self._live(await asyncio.to_thread(beside_rank, self._cfg, spec))
        await self._ready(engine)
        return engine

    async def _bring(self, engine: LiveEngine) -> None:
        """To the weights that the host's engines hold."""
        if self._labelled is not None:
            await engine.relabel(self._labelled)
        else:
            await self._weights.take_in(engine)

    # --- ending ---------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End the servers that were started here. May be called again."""
        await self._tending.stop()
        servers = [e.server for e in self._tending.engines if e.server is not None]
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))
        await self._weights.anchor_written()
        self._weights.close()
        await self._session.close()

    # --- helpers --------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return [engine.endpoint.name for engine in self._tending.engines]

    def _live(self, spec: ServerSpec) -> LiveEngine:
        return LiveEngine(spec.endpoint, self._cfg.rollout.tensor_parallel, self._session, Server(spec))

    async def _ready(self, engine: LiveEngine) -> None:
        assert engine.server is not None
        await engine.server.ready(self._session, self._cfg.rollout.start_timeout_s)

    async def _every(self, call: Callable[[LiveEngine], Awaitable[T]]) -> list[T]:
        """The call on every engine, side by side, each to its end. Raises the first failure; a server that ended shows its log."""
        engines = self._tending.engines
        results = await asyncio.gather(*(call(engine) for engine in engines), return_exceptions=True)
        for engine, result in zip(engines, results, strict=True):
            if isinstance(result, EngineLost) and not isinstance(result, NotStarted) and engine.server is not None:
                raise EngineLost(f"{result}; the end of {engine.server.spec.log}:\n{engine.server.tail()}") from result
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]

    def _check_model(self) -> None:
        path = self._cfg.model.path
        if not Path(path).is_dir():
            host = ray.util.get_node_ip_address()
            raise ValueError(f"model.path={path}: no such directory on {host}, where engines run; every engine host must see it")
        if not (Path(path) / "config.json").exists():
            raise ValueError(f"model.path={path}: no config.json there; give the directory of a Hugging Face model")


def open_session() -> aiohttp.ClientSession:
    """Connections for control calls: none is kept, so that none is stale after a long step."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
