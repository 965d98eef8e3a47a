"""What a checkpoint costs a training step: an asynchronous save of a 300 million parameter model, one rank over real Ray.

    python -m benchmarks.checkpoint_save [--tokens 16384] [--rounds 2] [--device cpu] [--folder /tmp]

A round is an update alone and an update with a save begun just before it; the costs are medians over the rounds, and the share is what an
update with a save takes longer. A save that is not durable when its update ends is waited for outside the clock, and the time is shown.
Beside them: the snapshot, that of the first save, which makes the memory that all use, the time until durable, a save that is waited for
with nothing else going on, and peak memory of the rank (VmHWM) over an update before the first save and over those with one, against the
bound of `slime.trainer.shards.snapshot`. Prints a table and writes
benchmarks/results/checkpoint_save.json (checkpoint_save_gpu.json with --device cuda). Wants 14 GB of memory, 10 GB of disk and a quarter
of an hour on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import ray
from ray.util.placement_group import placement_group
from rich.console import Console
from rich.table import Table

from slime.checkpoint.origin import Origin
from slime.checkpoint.saver import Saver
from slime.checkpoint.state import DriverState, write_state
from slime.cluster.placement import RolePlacement
from slime.config import SlimeConfig
from slime.trainer.group import TrainerGroup
from slime.trainer.saving import Saving
from slime.types import Batch, WeightVersion

RESULTS = Path(__file__).parent / "results"
BAR = 0.05
BYTES_PER_PARAMETER = 2 + 12  # of the share that the rank holds: bf16 weights, fp32 weights and moments
SLACK = 64 << 20  # for what is not numbers: the plan, headers, Python's own
TIMEOUT_S = 1800.0
MODEL = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 21,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "architectures": ["Qwen3ForCausalLM"],
}


@dataclass
class Found:
    """Seconds and bytes."""

    parameters: int
    tokens: int
    alone_s: list[float] = field(default_factory=list)  # an update
    saving_s: list[float] = field(default_factory=list)  # an update with a save begun before it
    first_snapshot_s: float = 0.0
    snapshot_s: list[float] = field(default_factory=list)  # of it: until the trainer may go on
    durable_s: list[float] = field(default_factory=list)  # from the begin of the save
    waited_s: list[float] = field(default_factory=list)  # of it: after the update
    blocking_s: float = 0.0  # a save with nothing beside it
    held: int = 0  # bytes of the snapshot
    resident: int = 0  # of the rank after an update
    peak_alone: int = 0
    peak_saving: int = 0
    bound: int = 0  # peak_alone and what a save may take beside

    @property
    def cost_s(self) -> float:
        return statistics.median(self.saving_s) - statistics.median(self.alone_s)

    @property
    def share(self) -> float:
        return self.cost_s / statistics.median(self.alone_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    ray.init(num_cpus=psutil.cpu_count(), include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.tokens, args.rounds, args.device)
    ray.shutdown()
    Console(width=120).print(table(found))
    RESULTS.mkdir(exist_ok=True)
    line = asdict(found) | {"cost_s": found.cost_s, "share": found.share, "share_every_10": found.share / 10}
    (RESULTS / f"checkpoint_save{'_gpu' if args.device == 'cuda' else ''}.json").write_text(json.dumps(line, indent=1) + "\n")
    return 0 if found.share <= BAR and found.peak_saving <= found.bound else 1


def make_model(path: Path) -> int:
    """Random weights. Returns the number of parameters."""
    import torch
    from transformers import Qwen3Config

    from slime.models.config_json import ConfigJson
    from slime.models.hf_files import HFWriter
    from slime.models.registry import FAMILIES

    Qwen3Config(**MODEL).save_pretrained(path.with_name("config"))
    shapes = FAMILIES["qwen3"].build(ConfigJson(path.with_name("config")), 1).hf_shapes
    with HFWriter(path, path.with_name("config"), shapes) as writer:
        for name, shape in shapes.items():
            fresh = torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02)
            writer.write(name, fresh.to(torch.bfloat16))
    return sum(prod(shape) for shape in shapes.values())


def make_batch(tokens: int) -> Batch:
    """Sequences of 256 tokens, the second half of each trained."""
    rng, length = np.random.default_rng(0), 256
    samples = tokens // length
    return Batch(
        tokens=rng.integers(1, MODEL["vocab_size"], tokens).astype(np.int32),
        cu_seqlens=np.arange(samples + 1, dtype=np.int64) * length,
        loss_mask=np.tile(np.arange(length) >= length // 2, samples),
        rollout_logprobs=np.zeros(tokens, np.float32),
        rewards=rng.normal(size=samples),
        group=np.arange(samples) // 2,
        version=np.zeros(samples, np.int64),
    )


def measure(folder: Path, tokens: int, rounds: int, device: Literal["cpu", "cuda"]) -> Found:
    parameters = make_model(folder / "model")
    cfg = SlimeConfig()
    cfg.model.path, cfg.cluster.device, cfg.rollout.max_response_tokens = str(folder / "model"), device, 256
    cfg.trainer.max_tokens_per_rank = 1024
    cfg.cluster.start_timeout_s = cfg.cluster.step_timeout_s = TIMEOUT_S
    cpus = float(psutil.cpu_count() or 1)
    pool = placement_group([{"CPU": cpus} | ({"GPU": 1} if device == "cuda" else {})])
    assert pool.wait(60)
    group = TrainerGroup.start(cfg, RolePlacement("actor", pool, [0], device, cpus))
    found, saver = Found(parameters, tokens), Saver(folder / "run", 1, 0, TIMEOUT_S)
    batch = ray.put(make_batch(tokens))
    group.update(batch)
    (rank,) = (p for p in psutil.Process().children(recursive=True) if (p.cmdline() or [""])[0].startswith("ray::Rank"))

    def shards(directory: Path) -> Saving:
        begun = time.perf_counter()
        saving = group.save(directory)
        found.snapshot_s.append(time.perf_counter() - begun)
        found.held = saving.host_bytes
        return saving

    forget_peak(rank)
    group.update(batch)
    found.peak_alone, found.resident = memory(rank, "VmHWM"), memory(rank, "VmRSS")
    found.bound = found.peak_alone + BYTES_PER_PARAMETER * parameters + SLACK
    forget_peak(rank)
    for number in (0, 1):  # the first save makes the memory
        begun = time.perf_counter()
        saver.start(number, shards, rest(number))
        saver.wait(TIMEOUT_S, "the benchmark")
        found.blocking_s = time.perf_counter() - begun
    found.first_snapshot_s, found.snapshot_s = found.snapshot_s[0], []
    for number in range(2, rounds + 2):
        begun = time.perf_counter()
        group.update(batch)
        found.alone_s.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        saver.start(number, shards, rest(number))
        group.update(batch)
        found.saving_s.append(time.perf_counter() - begun)
        (committed,) = saver.wait(TIMEOUT_S, "the benchmark")
        found.durable_s.append(committed.seconds)
        found.waited_s.append(max(0.0, time.perf_counter() - begun - found.saving_s[-1]))
    found.peak_saving = memory(rank, "VmHWM")
    saver.close()
    group.stop()
    return found


def rest(step: int):
    state = DriverState(step, WeightVersion(0, step, "benchmark"), {}, {}, {}, 0.0, Origin())
    return lambda directory: write_state(directory, state)


def forget_peak(process: psutil.Process) -> None:
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # VmHWM counts from here


def memory(process: psutil.Process, name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def table(found: Found) -> Table:
    shown = Table("", "", title=f"{found.parameters / 1e6:.0f} M parameters, {found.tokens} tokens a step, one rank")
    alone, saving = statistics.median(found.alone_s), statistics.median(found.saving_s)
    shown.add_row("update alone", f"{alone:.2f} s")
    shown.add_row("update with a save", f"{saving:.2f} s")
    shown.add_row("cost of a save", f"{found.cost_s:.2f} s = {found.share:.1%} of an update (bar {BAR:.0%})")
    shown.add_row("    with run.save_every=10", f"{found.share / 10:.1%} of an update")
    shown.add_row("    of it the snapshot", f"{statistics.median(found.snapshot_s):.2f} s (the first {found.first_snapshot_s:.2f} s)")
    shown.add_row("until durable", f"{statistics.median(found.durable_s):.1f} s, {statistics.median(found.waited_s):.1f} s past the update")
    shown.add_row("a save alone", f"{found.blocking_s:.1f} s")
    shown.add_row("the rank, at rest / update / with a save", " / ".join(map(gib, (found.resident, found.peak_alone, found.peak_saving))))
    shown.add_row("bound of the last", f"{gib(found.bound)} (a snapshot holds {gib(found.held)})")
    return shown


def gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
