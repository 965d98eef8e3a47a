"""Whole GRPO runs on one GPU that trainer and engine divide: `python -m benchmarks.gpu_recipe`, about eight minutes of a GPU with 139 GiB.

Qwen3-4B's shape with random weights; 12 prompts x 12 answers of 1,024 tokens a step; the reward is the share of response tokens with an
even id, lr 1e-6. Each run is `slime train` as a user types it:

    sync            rollout.mode=sync                       its steps against the sum of rollout and training
    sync, fp32      and logits in fp32, of both             its mismatch beside that of bf16
    one_step_off    rollout.mode=one_step_off               its steps against the larger of the two, and what each loses to sync's

A run is killed once its steps are recorded: its end would write a checkpoint of 56 GB.

Of every step: difference of log-probs between trainer and engine at most 0.02 on average, gradient norm and share of changed weights above
zero. Of steps after the first two the median: step time at most 1.05 x its floor, in sync rollout + training, one step off the larger.

Prints a table; JSON goes to $OUT or benchmarks/results. Exit code 1 where a bar fails.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_rollout import SGLANG
from benchmarks.gpu_train import out
from benchmarks.sync_gpu import build_native

MISMATCH_BAR, STEP_BAR, WARM = 0.02, 1.05, 2  # steps that are not timed: kernels are compiled in them
PROMPTS, PROMPT_LENGTH = 256, 120
STALLED_S = 600.0  # without a further step, after which a run is given up
FREE = 1 << 30  # bytes that may be used on a GPU that nobody computes on
FP32_HEAD = "+rollout.sglang.enable_fp32_lm_head=true"
RUNS = {
    "sync": ["rollout.mode=sync"],
    "sync, fp32 head": ["rollout.mode=sync", FP32_HEAD],
    "one_step_off": ["rollout.mode=one_step_off"],
}


@dataclass
class Row:
    """A run. Times are medians of its steps, seconds."""

    run: str
    start_s: float  # until the first step began
    steps: int
    step_s: float
    rollout_s: float
    train_s: float
    sync_s: float
    mismatch: float  # the largest of its steps
    grad_norm: float  # the smallest
    density: float  # the smallest after the first update
    memory_gb: float

    @property
    def floor_s(self) -> float:
        """What a step takes where nothing else costs time."""
        return max(self.rollout_s, self.train_s) if self.run == "one_step_off" else self.rollout_s + self.train_s

    def missed(self) -> list[str]:
        """The bars that it fails."""
        bars = {
            f"a step takes {self.step_s / self.floor_s:.3f} x its floor, at most {STEP_BAR}": self.step_s <= STEP_BAR * self.floor_s,
            f"log-probs differ by {self.mismatch:.4f}, at most {MISMATCH_BAR}": self.mismatch <= MISMATCH_BAR,
            f"gradient norm {self.grad_norm}": self.grad_norm > 0,
            f"density {self.density}": self.density > 0,
        }
        return [f"{self.run}: {said}" for said, holds in bars.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gpu_recipe"))
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    args = parser.parse_args()
    build_native()
    subprocess.run([sys.executable, "-m", "benchmarks.gpu_model", str(args.folder / "model")], check=True)  # it gives the GPU back
    write_prompts(args.folder / "prompts.jsonl")
    rows = [run(args.folder, name, args.steps, args.overrides) for name in args.runs]
    console = Console(width=150)
    console.print(table(rows))
    missed = [said for row in rows for said in row.missed()]
    for said in missed:
        console.print(f"missed  {said}", highlight=False)
    found = {"missed": missed, "runs": [asdict(row) | {"floor_s": row.floor_s} for row in rows]}
    (out() / "gpu_recipe.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 1 if missed else 0


def write_prompts(path: Path) -> None:
    """Random characters: no two prompts begin alike."""
    random, letters = np.random.default_rng(0), list("abcdefghijklmnopqrstuvwxyz ")
    prompts = ("".join(random.choice(letters, PROMPT_LENGTH)) for _ in range(PROMPTS))
    path.write_text("".join(json.dumps({"prompt": prompt, "label": ""}) + "\n" for prompt in prompts))


def run(folder: Path, name: str, steps: int, overrides: list[str]) -> Row:
    """One run from its command to its last step."""
    directory = folder / "runs" / name.replace(", ", "_").replace(" ", "_")
    shutil.rmtree(directory, ignore_errors=True)
    settings = {
        "run.name": directory.name,
        "run.dir": directory.parent,
        "run.steps": 1000,
        "model.path": folder / "model",
        "data.train": f"[{{path: {folder}/prompts.jsonl}}]",
        "data.max_prompt_tokens": 128,
        "rollout.prompts_per_step": 12,
        "rollout.samples_per_prompt": 12,
        "rollout.max_response_tokens": 1024,
        "reward.fn": "examples.rewards:even_share",
        "trainer.lr": 1e-6,
        "trainer.max_tokens_per_rank": 4096,
        "cluster.device": "cuda",
        "cluster.share": "split",
        "cluster.start_timeout_s": 300,
        "observe.wandb": "off",
        **{f"+rollout.sglang.{key}": value for key, value in SGLANG.items()},
    }
    words = [f"{key}={value}" for key, value in settings.items()] + RUNS[name] + overrides
    begun, command = time.time(), [sys.executable, "-m", "slime.cli.main", "train", "--config-name", "base"]
    process = subprocess.Popen([*command, *words], start_new_session=True)
    lines: list[dict[str, float]] = []
    late = begun + STALLED_S
    try:
        while len(lines) <= steps and process.poll() is None and time.time() < late:
            time.sleep(0.5)
            if len(found := read(directory / "metrics.jsonl")) > len(lines):
                start_s = time.time() - begun - sum(line["time/step_s"] for line in found)
                lines, late = found, time.time() + STALLED_S
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_free()
    if len(lines) <= steps:
        raise SystemExit(f"{name}: {max(0, len(lines) - 1)} of {steps} steps were recorded; see {directory}")
    return row_of(name, start_s, lines[1:])


def read(path: Path) -> list[dict[str, float]]:
    """A line a step, the first of which is before any."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_until_free() -> None:
    """The next run's engine takes its share of what is free."""
    for _ in range(120):
        if used_bytes() < FREE:
            return
        time.sleep(0.5)
    raise SystemExit(f"{used_bytes() >> 20} MiB of the GPU are still used a minute after the run was killed")


def used_bytes() -> int:
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return max(map(int, subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split())) << 20


def row_of(name: str, start_s: float, lines: list[dict[str, float]]) -> Row:
    timed = lines[WARM:]

    def typical(metric: str) -> float:
        return median(line[metric] for line in timed)

    return Row(
        run=name,
        start_s=start_s,
        steps=len(lines),
        step_s=typical("time/step_s"),
        rollout_s=typical("time/rollout_s"),
        train_s=typical("time/train_s"),
        sync_s=typical("time/sync_s"),
        mismatch=max(line["mismatch/logprob_abs_diff"] for line in lines),
        grad_norm=min(line["train/grad_norm"] for line in lines),
        density=min(line["sync/density"] for line in lines[1:]),
        memory_gb=max(line["perf/gpu_mem_gb"] for line in lines),
    )


def table(rows: list[Row]) -> Table:
    columns = (
        "run",
        "steps",
        "start",
        "step",
        "rollout",
        "training",
        "sync",
        "floor",
        "x floor",
        "mismatch",
        "grad norm",
        "density",
        "memory",
    )
    shown = Table(*columns, title="GRPO on one GPU, Qwen3-4B's shape; seconds, medians of steps")
    for row in rows:
        times = (row.start_s, row.step_s, row.rollout_s, row.train_s, row.sync_s, row.floor_s)
        rest = (
            f"{row.step_s / row.floor_s:.3f}",
            f"{row.mismatch:.4f}",
            f"{row.grad_norm:.3g}",
            f"{row.density:.3%}",
            f"{row.memory_gb:.1f} GB",
        )
        shown.add_row(row.run, str(row.steps), *(f"{seconds:.2f}" for seconds in times), *rest)
    return shown


if __name__ == "__main__":
    sys.exit(main())
