"""Runs of the real command for end-to-end tests: `slime train` in a process of its own, on a tiny model, and what it leaves behind."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import make_tiny

MARK = "SLIME_TEST_MARK"
ROOT = Path(__file__).parents[1]
LAUNCH_S = 240.0


@dataclass
class Launched:
    """A finished run of the command."""

    code: int
    out: str
    err: str
    run_dir: Path
    mark: str

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())


def make_inputs(folder: Path) -> Path:
    """A tiny model and prompts: folder/model, train.jsonl, eval.jsonl."""
    make_tiny(folder / "model", "qwen3", vocab=128)
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


def start(inputs: Path, name: str, *overrides: str) -> tuple[subprocess.Popen, str]:
    """Start the command; returns the process and the mark that everything it starts carries in its environment."""
    mark = secrets.token_hex(8)
    command = [sys.executable, "-m", "slime.cli.main", "train", *arguments(inputs, name, *overrides)]
    env = os.environ | {MARK: mark, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=inputs, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    return process, mark


def finish(process: subprocess.Popen, mark: str, run_dir: Path, timeout_s: float = LAUNCH_S) -> Launched:
    """Wait for the command; kills it when it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"the command did not end in {timeout_s} s:\n{out}\n{err}") from None
    return Launched(process.returncode, out, err, run_dir, mark)


def launch(inputs: Path, name: str, *overrides: str, timeout_s: float = LAUNCH_S) -> Launched:
    """Run the command to its end."""
    process, mark = start(inputs, name, *overrides)
    return finish(process, mark, inputs / "runs" / name, timeout_s)


def left_behind(mark: str, within_s: float = 15.0) -> list[str]:
    """Command lines of processes that the command started and that are still there after `within_s`."""
    give_up = time.monotonic() + within_s
    while (found := marked(mark)) and time.monotonic() < give_up:
        time.sleep(0.2)
    return found


def marked(mark: str) -> list[str]:
    """Command lines of all processes that carry the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes() and b"Z" not in _state(process):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
        except (OSError, PermissionError):  # it has ended meanwhile
            continue
    return found


def _state(process: Path) -> bytes:
    return (process / "stat").read_bytes().rpartition(b")")[2].split()[0]
