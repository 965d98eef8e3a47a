"""How fast a 4B model trains on one GPU: step and log-prob pass, beside what a large matrix product reaches there.

    python -m benchmarks.gpu_train [--shapes 16x1024 1x16384] [--trace]        one GPU with 139 GiB; about a minute

Qwen3-4B's shape with random weights, bf16 with fp32 main weights and gradients, nothing recomputed but norms and activations; GRPO over
packed micro-batches, seven eighths of them trained. A step is forward, backward and optimizer; a log-prob pass is forward.
FLOPs are those of `perf/mfu` (slime.trainer.performance): recomputation, padding and the pass for log-probs do not count. The floor is what
they take at the rate of an 8192 x 8192 product in bf16, measured in the same run. Memory is the most that tensors took, beside the estimate
of a dry run, which is to be within a tenth.

Prints a table, and what the GPU did in one step by kind of kernel; writes JSON to $OUT or benchmarks/results, with --trace a trace of that
step beside it, which https://ui.perfetto.dev opens. Exit code 1 where a bar fails.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_model import write_model
from benchmarks.sync_gpu import ROOT, VOCAB, build_native
from slime.config import SlimeConfig
from slime.config.parallel import parallel_sizes
from slime.config.plan_memory import Model, RankMemory, count_parameters, rank_memory
from slime.observe.trace import Tracer
from slime.trainer import device, distributed, performance
from slime.trainer.build import build_trainer
from slime.trainer.passes import log_probs
from slime.trainer.state import Trainer
from slime.trainer.step import train_batch
from slime.types import Batch

ROUNDS = 5
STEP_BAR, LOGPROBS_BAR = 0.40, 0.50  # of RATE,
BARRED = 16384  # with at least so many tokens in a micro-batch; smaller ones are for their memory
RATE = 790e12  # FLOP/s that an H200 reaches in a large product; bars are shares of it
KINDS = {  # what a kernel's name begins with or holds -> what it does
    "nvjet": "matrix products", "gemm": "matrix products", "flash": "attention", "adam": "Adam", "heads": "heads: norm and rotation",
    "swiglu": "gated activation", "norm": "norms", "token_": "log-probs", "memcpy": "copies", "memset": "zeros",
}  # fmt: skip


@dataclass
class Row:
    what: str
    seconds: float
    flops: float
    rate: float  # FLOP/s of a large product, in this run
    peak_gb: float  # 1e9 bytes
    estimate_gb: float  # of a dry run, without a snapshot of the weights
    bar: float | None

    @property
    def share(self) -> float:
        return self.flops / self.seconds / RATE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["16x1024", "1x16384", "4x1024"], help="sequences x tokens of a batch")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qwen3_4b"), help="of the checkpoint, which is made where it is missing")
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    build_native()
    write_model(args.folder)
    on = device.set_up("cuda", os.cpu_count() or 1)
    rate = product_rate()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    with on.scope():
        trainer = build(args.folder, on, max(n * length for n, length in shapes))
        rows = [row for shape in shapes for row in measure(trainer, *shape, rate)]
        kinds = profile(trainer, *shapes[0], out() / "gpu_train.trace.json.gz" if args.trace else None)
    Console(width=120).print(table(rows), of_kinds(kinds, rows[0].seconds))
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "product_tflops": rate / 1e12}
    found |= {"rows": [asdict(row) | {"share": row.share} for row in rows], "milliseconds_by_kind": kinds}
    (out() / "gpu_train.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.share >= (row.bar or 0.0) and abs(row.peak_gb / row.estimate_gb - 1) <= 0.1 for row in rows) else 1


def out() -> Path:
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def product_rate(size: int = 8192, times: int = 30) -> float:
    """FLOP/s of a bf16 product of random matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: [a @ b for _ in range(times)])
    return times * 2 * size**3 / seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, the median of some after one that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return median(seconds[1:])


def recipe(path: Path, tokens: int) -> SlimeConfig:
    cfg = SlimeConfig()
    cfg.model.path, cfg.model.dtype, cfg.cluster.device = str(path), "bf16", "cuda"
    cfg.rollout.max_response_tokens = cfg.trainer.max_tokens_per_rank = tokens
    cfg.data.max_prompt_tokens, cfg.trainer.lr = 0, 1e-6
    return cfg


def estimate(path: Path, tokens: int) -> RankMemory:
    """What a dry run says of a rank that trains a micro-batch of so many tokens."""
    config = json.loads((path / "config.json").read_text())
    return rank_memory(recipe(path, tokens), Model(config, count_parameters(path, config), 1), 1)


def build(path: Path, on: device.Device, tokens: int) -> Trainer:
    """As a rank builds it, alone."""
    cfg = recipe(path, tokens)
    parallel = distributed.join_groups(on, dist.HashStore(), 0, 1, parallel_sizes(cfg.trainer), 0, 60.0)
    return build_trainer(cfg, on, parallel, Tracer("rank 0"))


def batch_of(trainer: Trainer, sequences: int, length: int) -> Batch:
    """Random tokens of the current version; the first eighth of each sequence is a prompt."""
    random = np.random.default_rng(0)
    mask = np.ones((sequences, length), bool)
    mask[:, : length // 8] = False
    mask = mask.reshape(-1)
    return Batch(
        tokens=random.integers(4, VOCAB, sequences * length).astype(np.int32),
        cu_seqlens=np.arange(sequences + 1, dtype=np.int64) * length,
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -np.log(VOCAB), 0.0).astype(np.float32),
        rewards=random.normal(size=sequences),
        group=np.arange(sequences) // 4,
        version=np.full(sequences, trainer.version, np.int64),
    )


def measure(trainer: Trainer, sequences: int, length: int, rate: float) -> list[Row]:
    shape = f"{sequences} x {length}"
    step_bar, logprobs_bar = (STEP_BAR, LOGPROBS_BAR) if sequences * length >= BARRED else (None, None)
    flops = performance.train_flops(trainer.model.map, np.full(sequences, length))
    peaks: list[float] = []

    def step() -> None:
        peaks.append(train_batch(trainer, batch_of(trainer, sequences, length))["perf/gpu_mem_gb"])

    def look() -> None:
        log_probs(trainer, batch_of(trainer, sequences, length))

    memory = estimate(Path(trainer.cfg.model.path), sequences * length)
    without_graph = memory.held + memory.logits // 2
    rows = [Row(f"step, {shape}", timed(step), flops, rate, max(peaks), memory.total / 1e9, step_bar)]
    torch.cuda.reset_peak_memory_stats()
    seconds, most = timed(look), torch.cuda.max_memory_allocated() / 1e9
    return [*rows, Row(f"log-probs, {shape}", seconds, flops / 3, rate, most, without_graph / 1e9, logprobs_bar)]


def profile(trainer: Trainer, sequences: int, length: int, trace: Path | None) -> dict[str, float]:
    """Milliseconds of the GPU in one step by kind of kernel, the most first; the step as a trace where a path is given."""
    batch = batch_of(trainer, sequences, length)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        train_batch(trainer, batch)
        torch.cuda.synchronize()
    if trace is not None:
        plain = trace.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        trace.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name = event.name.lower()
            kinds[next((kind for part, kind in KINDS.items() if part in name), "elementwise and the rest")] += event.device_time / 1e3
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def table(rows: list[Row]) -> Table:
    title = f"Qwen3-4B's shape, bf16, {torch.cuda.get_device_name()}; a large product {rows[0].rate / 1e12:.0f} TFLOP/s"
    shown = Table("", "seconds", "floor", "TFLOP/s", f"of {RATE / 1e12:.0f}", "bar", "memory", "estimated", title=title)
    for row in rows:
        speeds = (f"{row.seconds:.3f}", f"{row.flops / row.rate:.3f}", f"{row.flops / row.seconds / 1e12:.0f}", f"{row.share:.1%}")
        shown.add_row(row.what, *speeds, "" if row.bar is None else f"{row.bar:.0%}", f"{row.peak_gb:.1f} GB", f"{row.estimate_gb:.1f} GB")
    return shown


def of_kinds(kinds: dict[str, float], seconds: float) -> Table:
    shown = Table("kernels of a step", "ms", "of the step", title="what the GPU does in a step of the first shape")
    for kind, ms in kinds.items():
        shown.add_row(kind, f"{ms:.1f}", f"{ms / seconds / 1e3:.1%}")
    shown.add_row("nothing", f"{max(0.0, seconds * 1e3 - sum(kinds.values())):.1f}", "")
    return shown


if __name__ == "__main__":
    sys.exit(main())
