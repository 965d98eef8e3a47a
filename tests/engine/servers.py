"""Real SGLang servers for tests: one recipe, and a server of it without Ray."""

import asyncio
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import aiohttp

from slime.config import SlimeConfig
from slime.engine import arguments, settings
from slime.engine.agent import open_session
from slime.engine.client import EngineClient, Generation, Sampling
from slime.engine.endpoint import Endpoint
from slime.engine.live import LiveEngine
from slime.engine.ports import free_ports
from slime.engine.server import Server, ServerSpec

HOST = "127.0.0.1"
PYTHON = os.environ.get("SLIME_TEST_ENGINE_PYTHON")  # of another SGLang
LOADED = "run/loaded"
VOCAB = 80


class Endless(Sampling):
    """An answer of max_new_tokens tokens, whatever is drawn."""

    def to_sglang(self) -> dict[str, Any]:
        return super().to_sglang() | {"ignore_eos": True}


def recipe(model: Path, **rollout: Any) -> SlimeConfig:
    """A recipe that serves `model` on the CPU."""
    cfg = SlimeConfig()
    cfg.model.path, cfg.model.dtype = str(model), "fp32"
    cfg.data.max_prompt_tokens, cfg.rollout.max_response_tokens = 200, 50
    cfg.cluster.device = "cpu"
    cfg.rollout.start_timeout_s = 120
    for name, value in rollout.items():
        setattr(cfg.rollout, name, value)
    return cfg


def spec(cfg: SlimeConfig, log: Path, port: int | None = None, name: str = "engine 0") -> ServerSpec:
    known = arguments.known_arguments(PYTHON)
    ports = free_ports(HOST, 2)
    device: settings.Device = "cuda" if cfg.cluster.device == "cuda" else "cpu"
    chosen = settings.server_arguments(cfg, device) | {"nccl_port": ports[1]}
    return ServerSpec(
        endpoint=Endpoint(f"http://{HOST}:{port or ports[0]}", secrets.token_hex(32), name, known.version),
        python=PYTHON or arguments.this_python(),
        words=arguments.command_line(chosen, known),
        environment=settings.server_environment(cfg, device, 1.0),
        label=LOADED,
        log=log,
    )


async def ready(server: Server, timeout_s: float) -> None:
    async with open_session() as session:
        await server.ready(session, timeout_s)


def start(cfg: SlimeConfig, log: Path, timeout_s: float = 120.0, port: int | None = None) -> Server:
    """A server that answers."""
    server = Server(spec(cfg, log, port))
    asyncio.run(ready(server, timeout_s))
    return server


def ask(server: Server, requests: list[tuple[list[int], Sampling]], label: str = LOADED, timeout_s: float = 60) -> list[Generation]:
    """Answers to requests that are sent together, in their order."""

    async def together() -> list[Generation]:
        async with EngineClient([server.spec.endpoint], vocab_size=VOCAB, timeout_s=timeout_s, max_in_flight=1000) as client:
            await client.expect(label)
            return await asyncio.gather(*(client.generate(ids, sampling) for ids, sampling in requests))

    return asyncio.run(together())


def with_engine(server: Server, do: "Any") -> Any:
    """Runs the coroutine function `do(LiveEngine, session)`."""

    async def run() -> Any:
        async with open_session() as session:
            return await do(LiveEngine(server.spec.endpoint, 1, session, server), session)

    return asyncio.run(run())


def update(server: Server, tensors: list[tuple[str, Any]], label: str) -> None:
    """All tensors, through SGLang's own update, in two buckets; a session that was left open is closed first."""

    async def do(engine: LiveEngine, session: aiohttp.ClientSession) -> None:
        await engine.pause("drain", 60)
        half = len(tensors) // 2
        await engine.load_whole([tensors[:half], tensors[half:]], label, 60)
        await engine.resume()

    with_engine(server, do)


def processes_of(word: str) -> list[int]:
    """Processes whose command line or environment holds `word`, this one apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def mischievous(folder: Path) -> str:
    """An interpreter of engines that misbehave, see tests/engine/mischief/sitecustomize.py; files mischief.<port> of `folder` tell how."""
    folder.mkdir(parents=True, exist_ok=True)
    python, site = folder / "python", Path(__file__).parent / "mischief"
    lines = ["#!/bin/sh", f"export SLIME_TEST_MISCHIEF={folder}/mischief", f'PYTHONPATH="{site}:$PYTHONPATH" exec {sys.executable} "$@"']
    python.write_text("\n".join(lines) + "\n")
    python.chmod(0o755)
    return str(python)
