"""Loading and exporting a model: seconds and host memory, ours beside transformers'.

    python -m benchmarks.checkpoints [--folder /tmp] [--layers 36]

Makes a checkpoint of Qwen3-4B's shape with random weights (bf16, 8 GB in three files) in a temporary folder, and measures in a process
each: our load (a rank's model and `load_hf`), our export (`write_hf`), transformers' from_pretrained and save_pretrained. Memory is what
a process takes above its libraries: `peak` counts mapped files too (VmHWM), `anonymous` what it allocated (RssAnon, sampled). transformers
leaves its weights in the mapped files and reads them when they are used: here every page is touched, for the load to be one. The bar is
1.2 times the shard and its largest tensor. Prints a table and writes benchmarks/results/checkpoints.json. The source
is in the page cache before the clock starts, and our export, unlike the other, waits until its files are on disk. Wants 25 GB of disk and
as much free memory as twice the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MEMORY_BAR = 1.2
EVERY_S = 0.005  # between two looks at the anonymous memory
EXPORT_BUCKET_BYTES = 64 << 20
PAGE = 2048  # bf16 elements
BLOCK = 16 << 20
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "architectures": ["Qwen3ForCausalLM"],
}
WAYS = ("slime load", "transformers load", "slime export", "transformers export")


@dataclass
class Row:
    """One way of loading or exporting. Bytes are those above the libraries."""

    way: str
    wall_s: float
    peak: int
    anonymous: int
    bar: int

    @property
    def held(self) -> bool:
        return self.peak < self.bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where the checkpoints are made")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # way, source, out: what a process of the benchmark does
    args = parser.parse_args()
    if args.measure:
        way, source, out = args.measure
        print(json.dumps(measure(way, Path(source), Path(out))))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source"
        shard, largest = make_checkpoint(source, Path(folder) / "config", args.layers)
        files = len(list(source.glob("*.safetensors")))
        bar = int(MEMORY_BAR * shard + largest)
        rows = [Row(way, **apart(way, source, Path(folder) / "out"), bar=bar) for way in WAYS]
    Console(width=120).print(table(rows, shard, largest, files))
    RESULTS.mkdir(exist_ok=True)
    found = {"shard": shard, "largest_tensor": largest, "files": files, "rows": [asdict(row) | {"held": row.held} for row in rows]}
    (RESULTS / "checkpoints.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.held for row in rows if row.way.startswith("slime")) else 1


def make_checkpoint(path: Path, config: Path, layers: int) -> tuple[int, int]:
    """Random weights, written tensor by tensor. Returns bytes of the model and of its largest tensor."""
    import torch
    from transformers import Qwen3Config

    from slime.models.config_json import ConfigJson
    from slime.models.hf_files import HFWriter
    from slime.models.registry import FAMILIES

    Qwen3Config(**QWEN3_4B, num_hidden_layers=layers).save_pretrained(config)
    shapes = FAMILIES["qwen3"].build(ConfigJson(config), 1).hf_shapes
    with HFWriter(path, config, shapes, max_shard_bytes=3 << 30) as writer:
        for name, shape in shapes.items():
            fresh = torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02)
            writer.write(name, fresh.to(torch.bfloat16))
    sizes = [2 * prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def apart(way: str, source: Path, out: Path) -> dict[str, Any]:
    """Measure in a process of its own; what it wrote is removed."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--measure", way, str(source), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for file in out.glob("*"):
        file.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, source: Path, out: Path) -> dict[str, Any]:
    """Seconds and bytes of one way. What an export needs first is loaded before the clock starts; so is the page cache, for all alike."""
    os.sync()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(BLOCK):
                pass
    return ours(source, out, "export" in way) if way.startswith("slime") else theirs(source, out, "export" in way)


def ours(source: Path, out: Path, export: bool) -> dict[str, Any]:
    import torch

    from slime.models.hf_files import HFWriter
    from slime.models.registry import load_map
    from slime.trainer.alone import alone
    from slime.trainer.export import make_atlas, write_hf
    from slime.trainer.model import Model, build_stages, load_hf
    from slime.trainer.options import sort_options

    class Stage(torch.nn.Module):
        """What `Model` expects around a stage."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    with alone() as parallel:
        libraries = Usage.now()
        model_map = load_map(source)

        def load() -> Any:
            config, stages = build_stages(model_map, torch.bfloat16, parallel, sort_options({}))
            load_hf(stages, model_map, source, parallel)
            return Model(model_map, config, [Stage(stages[0])], None, {})  # type: ignore[arg-type, list-item]

        if not export:
            return watched(libraries, load)
        model = load()

        def write() -> None:
            with HFWriter(out, source, model_map.hf_shapes) as writer:
                write_hf(model, make_atlas(model, parallel), writer, EXPORT_BUCKET_BYTES)

        return watched(libraries, write)


def theirs(source: Path, out: Path, export: bool) -> dict[str, Any]:
    import torch

    from slime.trainer.proof import hide_broken_torchvision

    hide_broken_torchvision()
    from transformers import Qwen3ForCausalLM

    libraries = Usage.now()

    def load() -> Any:
        model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.detach().view(-1)[::PAGE].sum()
        return model

    if not export:
        return watched(libraries, load)
    model = load()
    return watched(libraries, lambda: model.save_pretrained(out))


@dataclass
class Usage:
    """Memory of this process, in bytes."""

    peak: int  # since `watched` began
    resident: int
    anonymous: int

    @classmethod
    def now(cls) -> "Usage":
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(*(1024 * int(lines[field].split()[0]) for field in ("VmHWM", "VmRSS", "RssAnon")))


def watched(libraries: Usage, work: Callable[[], Any]) -> dict[str, Any]:
    """Do the work and tell how long it took and what it held at most, above the libraries."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    done, anonymous = threading.Event(), [0]

    def look() -> None:
        while not done.wait(EVERY_S):
            anonymous[0] = max(anonymous[0], Usage.now().anonymous)

    watcher = threading.Thread(target=look)
    watcher.start()
    begun = time.perf_counter()
    kept = work()
    wall_s = time.perf_counter() - begun
    done.set()
    watcher.join()
    del kept
    return {"wall_s": wall_s, "peak": Usage.now().peak - libraries.resident, "anonymous": anonymous[0] - libraries.anonymous}


def table(rows: list[Row], shard: int, largest: int, files: int) -> Table:
    title = f"a model of {gib(shard)} GiB in {files} files, largest tensor {gib(largest)} GiB"
    shown = Table("", "seconds", "peak GiB", "anonymous GiB", "bar GiB", "peak / shard", "", title=title)
    for row in rows:
        figures = (f"{row.wall_s:.1f}", gib(row.peak), gib(row.anonymous), gib(row.bar), f"{row.peak / shard:.2f}")
        shown.add_row(row.way, *figures, "held" if row.held else "above")
    return shown


def gib(size: int) -> str:
    return f"{size / (1 << 30):.2f}"


if __name__ == "__main__":
    sys.exit(main())
