"""Runs of the real command for end-to-end tests: `slime train` in a process of its own, on a tiny model, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.tiny import make_tiny

ROOT = Path(__file__).parents[1]
LAUNCH_S = 240.0


@dataclass
class Launched:
    """A finished run of the command."""

    code: int
    out: str
    err: str
    run_dir: Path
    offspring: "Offspring"

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())


def make_inputs(folder: Path, family: str = "qwen3", **config: object) -> Path:
    """A tiny model and prompts: folder/model, train.jsonl, eval.jsonl."""
    make_tiny(folder / "model", family, vocab=128, **config)
    for name, numbers in (("train", range(64)), ("eval", range(64, 72))):
        rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(inputs: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of a small GRPO run whose reward any model can raise. Later overrides win."""
    base = {
        "run.name": name,
        "run.dir": str(inputs / "runs"),
        "run.steps": "2",
        "model.path": str(inputs / "model"),
        "model.dtype": "fp32",
        "data.train": f"[{{path: {inputs}/train.jsonl}}]",
        "data.max_prompt_tokens": "16",
        "rollout.prompts_per_step": "4",
        "rollout.samples_per_prompt": "4",
        "rollout.max_response_tokens": "12",
        "reward.fn": "examples.rewards:even_share",
        "reward.workers": "1",
        "trainer.lr": "1e-3",
        "cluster.device": "cpu",
        "observe.wandb": "off",
    }
    base |= dict(o.split("=", 1) for o in overrides)
    return ["--config-name", "base", *(f"{key}={value}" for key, value in base.items())]


class Offspring:
    """Every process that descends from the command, noted while the command lives: some rename themselves, some outlive their parent."""

    def __init__(self, command: subprocess.Popen) -> None:
        self._root = psutil.Process(command.pid)
        self.begun_s = self._root.create_time()
        self._seen: set[psutil.Process] = set()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        try:
            while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
                self._seen |= set(self._root.children(recursive=True))
                time.sleep(0.1)
        except psutil.NoSuchProcess:
            return

    @property
    def count(self) -> int:
        """Processes that were ever seen."""
        return len(self._seen)

    def alive(self) -> dict[int, str]:
        """Process id -> name and command line of those that still run."""
        found = {}
        for process in set(self._seen):
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = f"{process.name()} {' '.join(process.cmdline())}"[:200]
            except psutil.NoSuchProcess:
                continue
        return found

    def left(self, within_s: float = 15.0) -> list[str]:
        """What still runs after `within_s`."""
        give_up = time.monotonic() + within_s
        while (found := self.alive()) and time.monotonic() < give_up:
            time.sleep(0.2)
        return list(found.values())


def start(inputs: Path, name: str, *overrides: str) -> tuple[subprocess.Popen, Offspring]:
    """Start the command; returns the process and the watch over what it starts."""
    command = [sys.executable, "-m", "slime.cli.main", "train", *arguments(inputs, name, *overrides)]
    env, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=inputs, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    return process, Offspring(process)


def finish(process: subprocess.Popen, offspring: Offspring, run_dir: Path, timeout_s: float = LAUNCH_S) -> Launched:
    """Wait for the command; kills it when it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"the command did not end in {timeout_s} s:\n{out}\n{err}") from None
    return Launched(process.returncode, out, err, run_dir, offspring)


def launch(inputs: Path, name: str, *overrides: str, timeout_s: float = LAUNCH_S) -> Launched:
    """Run the command to its end."""
    process, offspring = start(inputs, name, *overrides)
    return finish(process, offspring, inputs / "runs" / name, timeout_s)


def wait_for_line(path: Path, count: int, timeout_s: float = 180.0) -> None:
    """Wait until a file has `count` lines."""
    give_up = time.monotonic() + timeout_s
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < give_up, f"{path} has no {count} lines after {timeout_s} s"
        time.sleep(0.1)
