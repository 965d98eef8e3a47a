"""What our client and router cost: tokens/s of one SGLang server through them, beside a load that does nothing but ask.

    python -m benchmarks.gpu_rollout [--requests 64 256 1024 2048]        one GPU with 60 GB, stock SGLang; about four minutes

Both loads send the same requests to the same server, which is started as a run starts it: 16 prompts of 128 random tokens each asked many
times, log-probs wanted, 256 tokens to be drawn whatever they are, so many requests under way at once, twice as many in all.
They take turns. The bare load is aiohttp posting ready bytes and throwing the answers away unread; ours is `EngineClient.generate`, with
its router, its checks and its records. CPU is what the process that asks took, for each token drawn. Router: `acquire` and `release` alone,
with so many requests under way on 32 engines.

Prints a table, writes JSON to $OUT or benchmarks/results. Exit code 1 where ours is below 95 % of the bare load.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_model import write_model
from benchmarks.gpu_train import out
from benchmarks.sync_gpu import VOCAB, build_native
from slime.config import SlimeConfig
from slime.engine.arguments import command_line, known_arguments, this_python
from slime.engine.client import EngineClient
from slime.engine.endpoint import Endpoint
from slime.engine.generation import Sampling
from slime.engine.routing import Router
from slime.engine.server import Server, ServerSpec
from slime.engine.settings import server_arguments, server_environment

PROMPTS, PROMPT_TOKENS, DRAWN, EACH = 16, 128, 256, 2
BAR, ROUNDS, ENGINES = 0.95, 2, 32
WAIT_S, PORT, LABEL = 600.0, 30111, "bench:0:0"
SGLANG = {  # kernels that are compiled where they run, but for FA3 and flashinfer
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_backend_prefill": "disabled",
}
Ask = Callable[[int], Awaitable[int]]  # number of a request -> tokens drawn


class Whole(Sampling):
    """An answer that no end token ends."""

    def to_sglang(self) -> dict[str, Any]:
        return super().to_sglang() | {"ignore_eos": True}


@dataclass
class Row:
    """One number of requests under way."""

    requests: int
    bare: float  # tokens/s
    ours: float
    bare_cpu_us: float  # of a token
    ours_cpu_us: float
    cached: float  # share of the prompts' tokens that came from the engine's cache, of ours
    router_us: float  # of a request

    @property
    def share(self) -> float:
        return self.ours / self.bare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qwen3_4b"), help="of the checkpoint, which is made where it is missing")
    args = parser.parse_args()
    build_native()
    write_model(args.folder)
    rows = asyncio.run(measure(args.folder, args.requests))
    Console(width=120).print(table(rows))
    return 0 if all(row.share >= BAR for row in rows) else 1


def spec_of(model: Path, most_requests: int) -> ServerSpec:
    cfg = SlimeConfig()
    cfg.model.path, cfg.model.dtype, cfg.cluster.device = str(model), "bf16", "cuda"
    cfg.rollout.sglang = SGLANG | {
        "mem_fraction_static": 0.8,
        "cuda_graph_max_bs_decode": min(512, most_requests),
        "max_running_requests": most_requests,
    }
    known = known_arguments()
    endpoint = Endpoint(f"http://127.0.0.1:{PORT}", "bench", "engine 0", known.version)
    words = command_line(server_arguments(cfg, "cuda"), known)
    return ServerSpec(endpoint, this_python(), words, server_environment(cfg, "cuda", 8.0), LABEL, out() / "gpu_rollout.log")


async def measure(model: Path, asked: list[int]) -> list[Row]:
    random = np.random.default_rng(0)
    prompts = random.integers(4, VOCAB, (PROMPTS, PROMPT_TOKENS)).tolist()
    spec = spec_of(model, max(asked))
    endpoint, rows = spec.endpoint, []
    server = Server(spec)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)) as session,
        EngineClient([endpoint], vocab_size=VOCAB, timeout_s=WAIT_S, max_in_flight=max(asked)) as client,
    ):
        await server.ready(session, WAIT_S)
        await client.expect(LABEL)
        sampling = Whole(DRAWN)
        bodies = [orjson.dumps({"input_ids": ids, "sampling_params": sampling.to_sglang(), "return_logprob": True}) for ids in prompts]
        cached: list[float] = []

        async def bare(number: int) -> int:
            headers = {"Content-Type": "application/json", **endpoint.headers}
            async with session.post(f"{endpoint.url}/generate", data=bodies[number % PROMPTS], headers=headers) as response:
                assert response.status == 200, await response.text()
                await response.read()
            return DRAWN

        async def ours(number: int) -> int:
            answer = await client.generate(prompts[number % PROMPTS], sampling, session=number % PROMPTS)
            cached.append(answer.cached_tokens / answer.prompt_tokens)
            return len(answer.output_ids)

        await load(bare, 64, 64)  # graphs and caches are warm
        for requests in asked:
            cached.clear()
            found: dict[Ask, list[tuple[float, float]]] = {bare: [], ours: []}
            for turn in range(ROUNDS):
                for ask in (bare, ours) if turn % 2 == 0 else (ours, bare):
                    found[ask].append(await load(ask, requests, EACH * requests))
            (bare_rate, bare_cpu), (ours_rate, ours_cpu) = (map(median, zip(*found[ask], strict=True)) for ask in (bare, ours))
            rows.append(Row(requests, bare_rate, ours_rate, bare_cpu, ours_cpu, float(np.mean(cached)), router_us(requests)))
            (out() / "gpu_rollout.json").write_text(json.dumps([asdict(row) | {"share": row.share} for row in rows], indent=1) + "\n")
    server.stop()
    return rows


async def load(ask: Ask, at_once: int, count: int) -> tuple[float, float]:
    """(tokens/s, microseconds of this process's CPU for a token)."""
    numbers = iter(range(count))
    begun, begun_cpu = time.perf_counter(), time.process_time()

    async def asks() -> int:
        return sum([await ask(number) for number in numbers])

    tokens = sum(await asyncio.gather(*(asks() for _ in range(at_once))))
    return tokens / (time.perf_counter() - begun), (time.process_time() - begun_cpu) / tokens * 1e6


def router_us(under_way: int, turns: int = 20_000) -> float:
    """Microseconds of placing and releasing one request while so many are under way."""
    router = Router([f"engine {i}" for i in range(ENGINES)])
    for engine in range(ENGINES):
        router.ready(engine)
    placed = [router.acquire(session) for session in range(under_way)]
    begun = time.perf_counter()
    for turn in range(turns):
        router.release(placed[turn % under_way])
        placed[turn % under_way] = router.acquire(under_way + turn)
    return (time.perf_counter() - begun) / turns * 1e6


def table(rows: list[Row]) -> Table:
    columns = ("under way", "bare", "ours", "share", "bar", "CPU a token, bare", "ours", "cached", "router")
    shown = Table(*columns, title=f"tokens/s of one server, {PROMPT_TOKENS} tokens in, {DRAWN} out")
    for row in rows:
        speeds = (f"{row.bare:,.0f}", f"{row.ours:,.0f}", f"{row.share:.1%}", f"{BAR:.0%}")
        costs = (f"{row.bare_cpu_us:.1f} us", f"{row.ours_cpu_us:.1f} us", f"{row.cached:.0%}", f"{row.router_us:.1f} us")
        shown.add_row(f"{row.requests}", *speeds, *costs)
    return shown


if __name__ == "__main__":
    sys.exit(main())
