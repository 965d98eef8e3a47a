"""An engine that is none: SGLang's control calls over HTTP, and the real in-server part on a small model of several ranks behind them.

Whatever is asked of it can be delayed, refused, done twice or lost, and it can end and start anew, all within the test's own process.
"""

import asyncio
import base64
import json
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from slime.engine.endpoint import Endpoint
from slime.engine.host_copy import bits_of
from slime.engine.settings import LOADER
from slime.models.hf_files import HFReader
from slime.sync.inserver import InserverRank

BF16, FP32 = torch.bfloat16, torch.float32
# Odd sizes, one element, two dtypes; `big` is more than a part of 1 MiB.
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed": ((11, 7), BF16),
    "up": ((8, 7), BF16),
    "gate": ((8, 7), BF16),
    "down": ((7, 8), BF16),
    "norm": ((7,), FP32),
    "scale": ((1, 1, 1), FP32),
    "one": ((1,), BF16),
    "big": ((64, 8195), BF16),
    "turned": ((3, 5), BF16),
}
Hook = Callable[["ToyEngine", str, dict[str, Any]], Awaitable[None]]
RANK = threading.local()


def this_rank() -> int:
    """Which rank runs now; stands in for inserver._rank, as all ranks are in one process."""
    return getattr(RANK, "number", 0)


class Model(torch.nn.Module):
    """One rank's: a tied head, fused and split rows, split columns, replicas, padding, a tensor in another form."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks

        def weight(*shape: int, dtype: torch.dtype = BF16) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

        self.embed = weight(13, 7)  # two rows of padding
        self.head = self.embed
        self.fused = weight(16 // ranks, 7)
        self.down = weight(7, 8 // ranks)
        self.norm, self.scale, self.one = weight(7, dtype=FP32), weight(1, 1, 1, dtype=FP32), weight(1)
        self.big = weight(64 // ranks, 8195)
        self.turned = weight(5, 3)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = 8 // self.ranks
        for name, w in weights:
            match name:
                case "embed":
                    self.embed.data[:11].copy_(w)
                case "up":
                    self.fused.data[:rows].copy_(w.chunk(self.ranks)[self.rank])
                case "gate":
                    self.fused.data[rows:].copy_(w.chunk(self.ranks)[self.rank])
                case "down":
                    self.down.data.copy_(w.chunk(self.ranks, 1)[self.rank])
                case "big":
                    self.big.data.copy_(w.chunk(self.ranks)[self.rank])
                case "turned":
                    self.turned.data.copy_(w.float().t())  # by way of a cast: opaque
                case _:
                    getattr(self, name).data.copy_(w)


def make_model(directory: Path, seed: int = 0) -> Path:
    """A model directory."""
    directory.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text("{}")
    return directory


class Rank(InserverRank):
    """Knows which one it is, though all are in one process."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def command(self, model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        RANK.number = self.number
        super().command(model, named_tensors)

    def message(self, fields: dict[str, Any]) -> dict[str, Any]:
        RANK.number = self.number
        return super().message(fields)

    def close(self) -> None:
        if self._door is not None and self._door.is_alive():
            self._door.close()


class ToyEngine:
    """`before` and `after` are called around every call, with its path and body; an exception breaks the connection."""

    def __init__(self, directory: Path, ranks: int = 2, name: str = "engine 0") -> None:
        self.directory, self.ranks = directory, ranks
        self.before: Hook | None = None
        self.after: Hook | None = None
        self.calls: list[str] = []  # paths, and the operations of commands
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()
        port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.spec = SimpleNamespace(endpoint=Endpoint(f"http://127.0.0.1:{port}", "", name, "0.5.23"), log=Path("engine.log"))

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """With the model directory's weights, as after a restart."""
        self.down = self.paused = self.session = False
        self.label = "run/loaded"
        self.inside = [Rank(number) for number in range(self.ranks)]
        self.models = [Model(number, self.ranks) for number in range(self.ranks)]
        for model in self.models:
            model.load_weights(load_file(self.directory / "model.safetensors").items())

    def crash(self) -> None:
        """Nothing answers any more, and what it held is gone."""
        self.down = True
        for rank in self.inside:
            rank.close()
        self.models = []

    def stop(self) -> None:
        """As a server is ended by its host agent."""
        if not self.down:
            self.crash()

    def close(self) -> None:
        self.stop()
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)

    @property
    def alive(self) -> bool:
        return not self.down

    def tail(self) -> str:
        return "(a toy has no log)"

    async def _listen(self) -> int:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    # --- what it holds ------------------------------------------------------------------------------------------------

    def holds(self, bits: list[np.ndarray]) -> bool:
        """Whether every rank's memory is what a full load of these tensors leaves (bits, in the order of HFReader.names)."""
        names = HFReader(self.directory).names
        for mine in self.models:
            full = Model(mine.rank, mine.ranks)
            full.load_weights((n, _tensor(n, b)) for n, b in zip(names, bits, strict=True))
            pairs = zip(mine.parameters(), full.parameters(), strict=True)
            if not all((bits_of(a) == bits_of(b)).all() for a, b in pairs):
                return False
        return True

    # --- SGLang's calls -----------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.Response:
        path = f"/{request.match_info['path']}"
        body = json.loads(await request.read() or b"{}")
        try:
            if self.before is not None:
                await self.before(self, path, body)
            if self.down:
                raise ConnectionError
            answer = self.do(path, body)
            if self.after is not None:
                await self.after(self, path, body)
        except ConnectionError:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.json_response(answer, status=200 if answer.get("success", True) else 400)

    def do(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A call, done."""
        match path:
            case "/model_info":
                return {"weight_version": self.label}
            case "/v1/loads":
                return {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]}
            case "/server_info":
                return {"version": "0.5.23", "tp_size": self.ranks, "custom_weight_loader": [LOADER]}
        self.calls.append(operation(path, body))
        match path:
            case "/pause_generation":
                self.paused = True
            case "/continue_generation":
                self.paused = False
            case "/begin_weight_update" | "/end_weight_update":
                if self.session == (path == "/begin_weight_update"):
                    return {"success": False, "message": "a session is open" if self.session else "no session is open"}
                self.session = not self.session
            case "/update_weights_from_tensor":
                return self._update(body)
            case "/update_weight_version":
                self.label = body["new_version"]
        return {"success": True, "message": "Success"}

    def _update(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.session:
            return {"success": False, "message": "must run between begin_weight_update() and end_weight_update()"}
        assert self.paused, "unpaused, this call drains all requests"
        for rank, model, payload in zip(self.inside, self.models, body["serialized_named_tensors"], strict=True):
            named = pickle.loads(base64.b64decode(payload))
            if body["load_format"] == LOADER:
                rank.command(model, named)
            else:
                model.load_weights(named)
        self.label = body["weight_version"] or self.label
        return {"success": True, "message": "Success"}


def operation(path: str, body: dict[str, Any]) -> str:
    """What a call is for: its path, or the operation of the command that it carries."""
    if body.get("load_format") == LOADER:
        return json.loads(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))[0][0])["op"]
    return path


def _tensor(name: str, bits: np.ndarray) -> torch.Tensor:
    shape, dtype = SHAPES[name]
    return torch.from_numpy(bits.copy().view(f"i{bits.itemsize}")).view(dtype).reshape(shape)
