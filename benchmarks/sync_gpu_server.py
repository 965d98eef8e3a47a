"""The server of `benchmarks.sync_gpu engine`, and requests that run in it meanwhile."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.sync_gpu import ROOT

PORT = 30000
START_S, CALL_S = 300.0, 120.0
REQUESTS = 64
FLAGS = (
    "--attention-backend triton --sampling-backend pytorch --grammar-backend none --cuda-graph-backend-prefill disabled "
    f"--cuda-graph-max-bs-decode {REQUESTS} --mem-fraction-static 0.5 --skip-tokenizer-init "
    "--custom-weight-loader slime.sync.inserver.load"
).split()


class Server:
    """Stock SGLang in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "server.log"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        line = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder / "a"), "--port", str(PORT), *FLAGS]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("/health", method="GET")
                return
            except (OSError, RuntimeError, http.client.HTTPException):
                time.sleep(0.5)
        raise RuntimeError(f"SGLang did not come up within {START_S:g} s, or ended with {self.process.poll()}")

    def post(self, path: str, **fields: Any) -> float:
        """Seconds of a call that must succeed."""
        begun = time.perf_counter()
        self.ask(path, **fields)
        return time.perf_counter() - begun

    def ask(self, path: str, method: str = "POST", **fields: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=CALL_S)
        try:
            connection.request(method, path, json.dumps(fields) if fields else "{}", {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {text[:500]}")
        found = json.loads(text) if text.startswith(("{", "[")) else text
        if isinstance(found, dict) and found.get("success") is False:
            raise RuntimeError(f"{path}: {text[:500]}")
        return found

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        if out := os.environ.get("OUT"):
            (Path(out) / "server.log").write_text(self.log.read_text(errors="replace")[-4_000_000:])


class Generation:
    """64 requests that run in the background."""

    def __init__(self, server: Server, tokens: int) -> None:
        self.server, self.tokens = server, tokens
        self.answer: Any = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.begun = time.perf_counter()
        self.thread.start()

    def _run(self) -> None:
        prompts = [[5 + i, *range(6, 21)] for i in range(REQUESTS)]
        self.answer = self.server.ask(
            "/generate", input_ids=prompts, sampling_params={"max_new_tokens": self.tokens, "temperature": 1.0, "ignore_eos": True}
        )
        self.ended = time.perf_counter()

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def finish(self) -> float:
        """tokens/s. Every request must have all its tokens."""
        self.thread.join(CALL_S)
        if self.answer is None or any(len(one["output_ids"]) != self.tokens for one in self.answer):
            raise RuntimeError("requests did not finish whole")
        return REQUESTS * self.tokens / (self.ended - self.begun)
