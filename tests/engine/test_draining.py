"""Versions that are published while requests of others come and run: all arrive, and the server lives.

With SLIME_TEST_ENGINE_PYTHON, on the SGLang of that interpreter.
"""

import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from tests.engine import servers
from tests.engine.weights_double import Bits, Host, bf16_recipe, open_channel
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
VERSIONS = 6
TOKENS = 250  # of an answer that runs meanwhile
PROMPT = 150  # tokens: computing it takes longer than an answer


def generate(endpoint: Endpoint, prompt: list[int], tokens: int) -> int:
    """Tokens that were answered, of `tokens`, to somebody who knows nothing of the run."""
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
    headers = endpoint.headers | {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return len(json.load(answer)["output_ids"])


class Others:
    """Short requests, again and again."""

    def __init__(self, endpoint: Endpoint, threads: int) -> None:
        self._endpoint, self._stop = endpoint, threading.Event()
        self.missing: list[int] = []  # tokens of each answer
        self._pool = ThreadPoolExecutor(threads)
        self._work = [self._pool.submit(self._ask, random.Random(seed)) for seed in range(threads)]

    def _ask(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            tokens = rng.choice([1, 1, 3])
            prompt = [rng.randrange(5, 70) for _ in range(PROMPT)]
            self.missing.append(tokens - generate(self._endpoint, prompt, tokens))
            time.sleep(rng.uniform(0.0, 0.15))

    def end(self) -> None:
        """Raises what any of them raised."""
        self._stop.set()
        for work in self._work:
            work.result(60)


@pytest.mark.slow
@pytest.mark.parametrize("pause", ["drain", "in_place"])
def test_requests_of_others_do_not_hinder_a_version(pause: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16")
    with ExitStack() as stack:
        cfg = bf16_recipe(model)
        cfg.sync.pause = pause
        server = servers.start(cfg, tmp_path / "engine.log")
        stack.callback(server.stop)
        host = stack.enter_context(Host(cfg, [server]))
        bits = Bits(model)
        channel = open_channel(cfg, bits, host)
        others = Others(server.spec.endpoint, 3)
        for number in range(1, VERSIONS + 1):
            bits.step(number)
            channel.publish(number)
        others.end()
        assert server.alive
        assert len(others.missing) > VERSIONS and not any(others.missing)
        assert host.run(host.live[0].label()) == f"run/0/{VERSIONS}"


@pytest.mark.parametrize("how", ["heal", pytest.param("full", marks=pytest.mark.slow)])
def test_an_engine_that_others_use_is_loaded_whole(how: str, tmp_path: Path) -> None:
    """Their answers begin anew or, before SGLang 0.5.21, are cut short."""
    model = make_tiny(tmp_path / "model", dtype="bf16")
    with ExitStack() as stack:
        cfg = bf16_recipe(model)
        cfg.sync.pause = "in_place"
        cfg.sync.mode, cfg.sync.on_mismatch = ("delta", "heal") if how == "heal" else ("full", "stop")
        server = servers.start(cfg, tmp_path / "engine.log")
        stack.callback(server.stop)
        host = stack.enter_context(Host(cfg, [server]))
        bits = Bits(model)
        channel = open_channel(cfg, bits, host)
        channel.publish(0)
        [[flipper]] = host.flippers(tmp_path)
        running = [stack.enter_context(ThreadPoolExecutor(1)).submit(generate, server.spec.endpoint, [i, 7, 8], TOKENS) for i in (5, 6)]
        wait_until(lambda: host.run(Control(host.live[0].endpoint, host._session).running()) == 2)
        if how == "heal":
            flipper.flip("model.norm.weight", 0, 0)
        bits.step(1)
        metrics = channel.publish(1)
        assert metrics["sync/healed"] == (how == "heal")
        answered = [one.result(60) for one in running]
        assert server.alive and host.run(host.live[0].label()) == "run/0/1"
        whole = host.live[0].facts.flush_while_retracted
        assert all((tokens == TOKENS) == whole for tokens in answered), answered
        bits.step(2)
        channel.publish(2)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
