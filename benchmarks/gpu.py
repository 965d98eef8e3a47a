"""Everything that is measured on one GPU, in one call: `python -m benchmarks.gpu [--parts train publish ...] [--limit 480]`.

    train      benchmarks.gpu_train            a step and a log-prob pass of a 4B model, and a trace of its kernels
    kernels    benchmarks.sync_gpu kernels     audit, scatter
    publish    benchmarks.sync_gpu publish     diff and encode
    runs       benchmarks.gpu_recipe           GRPO end to end with `slime train`, trainer and engine on one GPU
    rollout    benchmarks.gpu_rollout          client and router against a bare load

Each is a process of its own, which has the GPU to itself and gives it back. One that does not fit into what is left of --limit, in seconds,
is ended and named. What each prints goes to a log beside its results.

Prints one table, each figure beside its floor and its bar; writes gpu.json to $OUT or benchmarks/results, and what the parts write into a
folder each there. Exit code 1 where a bar fails or a part did not end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT_S, ENDING_S = 480.0, 20.0
COMMANDS = {
    "train": ["benchmarks.gpu_train", "--trace"],
    "kernels": ["benchmarks.sync_gpu", "kernels"],
    "publish": ["benchmarks.sync_gpu", "publish"],
    "runs": ["benchmarks.gpu_recipe", "--runs", "sync", "--steps", "6"],
    "rollout": ["benchmarks.gpu_rollout", "--requests", "64", "256", "1024"],
}


@dataclass
class Figure:
    """One measured number. `floor`: what memory or arithmetic alone would take, in the same unit; `bar`: what it is held to."""

    part: str
    what: str
    value: float
    unit: str
    floor: float | None = None
    bar: float | None = None
    at_least: bool = False  # the bar is a lower one

    @property
    def held(self) -> bool:
        return self.bar is None or (self.value >= self.bar if self.at_least else self.value <= self.bar)

    @property
    def said(self) -> str:
        return f"{self.part}: {self.what}: {self.value:g} {self.unit}, to be at {'least' if self.at_least else 'most'} {self.bar:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--limit", type=float, default=LIMIT_S)
    args = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    until, figures, missed, seconds = time.monotonic() + args.limit, [], [], {}
    for part in args.parts:
        begun = time.monotonic()
        ended = run(part, folder / part, until - ENDING_S - begun)
        seconds[part] = time.monotonic() - begun
        figures += list(FIGURES[part](folder / part)) if ended else []
        missed += [] if ended else [f"{part}: not ended after {seconds[part]:.0f} s; see {folder / part}/log"]
    Console(width=130).print(table(figures, seconds))
    missed += [figure.said for figure in figures if not figure.held]
    for said in missed:
        Console(width=130).print(f"missed  {said}", highlight=False)
    found = {"seconds": seconds, "missed": missed, "figures": [asdict(figure) | {"held": figure.held} for figure in figures]}
    (folder / "gpu.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 1 if missed else 0


def run(part: str, folder: Path, limit_s: float) -> bool:
    """Whether it ended within `limit_s`, well or not: its own bars are shown with all others."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *COMMANDS[part]], env=os.environ | {"OUT": str(folder)}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(max(1.0, limit_s)) in (0, 1)
        except subprocess.TimeoutExpired:
            return False
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)  # all that it started
            process.wait()


def of_train(folder: Path) -> Iterator[Figure]:
    for row in json.loads((folder / "gpu_train.json").read_text())["rows"]:
        yield Figure("train", row["what"], row["seconds"], "s", row["flops"] / row["rate"])
        yield Figure("train", f"{row['what']}: of 790 TFLOP/s", row["share"], "", None, row["bar"], at_least=True)
        yield Figure("train", f"{row['what']}: memory over its estimate", row["peak_gb"] / row["estimate_gb"], "", None, 1.1)


def of_channel(name: str, part: str) -> Callable[[Path], Iterator[Figure]]:
    def figures(folder: Path) -> Iterator[Figure]:
        for row in json.loads((folder / f"{name}.json").read_text())["rows"]:
            yield Figure(part, row["what"], row["ms"], "ms", row["floor_ms"], row["bar_ms"])

    return figures


def of_runs(folder: Path) -> Iterator[Figure]:
    for run in json.loads((folder / "gpu_recipe.json").read_text())["runs"]:
        yield Figure("runs", f"{run['run']}: step", run["step_s"], "s", run["floor_s"], 1.05 * run["floor_s"])
        yield Figure("runs", f"{run['run']}: log-prob difference", run["mismatch"], "nats", None, 0.02)


def of_rollout(folder: Path) -> Iterator[Figure]:
    for row in json.loads((folder / "gpu_rollout.json").read_text()):
        yield Figure("rollout", f"{row['requests']} requests under way", row["ours"], "tokens/s", row["bare"])
        yield Figure("rollout", f"{row['requests']} requests under way: of the bare load", row["share"], "", None, 0.95, at_least=True)


FIGURES: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "train": of_train,
    "kernels": of_channel("sync_gpu_kernels", "kernels"),
    "publish": of_channel("sync_gpu_publish", "publish"),
    "runs": of_runs,
    "rollout": of_rollout,
}


def table(figures: list[Figure], seconds: dict[str, float]) -> Table:
    took = ", ".join(f"{part} {s:.0f} s" for part, s in seconds.items())
    shown = Table("", "figure", "measured", "floor", "bar", "", title=f"one GPU: {took}")
    for figure in figures:
        cells = [number(value) for value in (figure.value, figure.floor, figure.bar)]
        shown.add_row(figure.part, figure.what, f"{cells[0]} {figure.unit}", cells[1], cells[2], "" if figure.held else "missed")
    return shown


def number(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
