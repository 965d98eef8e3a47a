"""Versions that are published while requests of others keep coming: all arrive, none is lost, and the server lives.

With SLIME_TEST_ENGINE_PYTHON, on the SGLang of that interpreter.
"""

import json
import random
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.engine import servers
from tests.engine.weights_double import Bits, Host, bf16_recipe, open_channel
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e
VERSIONS = 6
PROMPT = 150  # tokens: computing it takes longer than an answer


class Others:
    """Requests from threads that know nothing of the run."""

    def __init__(self, server: Any, threads: int) -> None:
        self._endpoint, self._stop = server.spec.endpoint, threading.Event()
        self.missing: list[int] = []  # tokens of each answer
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        headers = self._endpoint.headers | {"Content-Type": "application/json"}
        while not self._stop.is_set():
            tokens = rng.choice([1, 1, 3])
            body = {
                "input_ids": [rng.randrange(5, 70) for _ in range(PROMPT)],
                "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True},
            }
            request = urllib.request.Request(f"{self._endpoint.url}/generate", json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    self.missing.append(tokens - len(json.load(answer)["output_ids"]))
            except OSError as error:
                self.failed.append(str(error))
                return
            time.sleep(rng.uniform(0.0, 0.15))

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


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
        others = Others(server, 3)
        for number in range(1, VERSIONS + 1):
            bits.step(number)
            channel.publish(number)
        others.end()
        assert server.alive and not others.failed
        assert len(others.missing) > VERSIONS and not any(others.missing)
        assert host.run(host.live[0].label()) == f"run/0/{VERSIONS}"
