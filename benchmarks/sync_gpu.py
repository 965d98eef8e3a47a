"""The weight channel on a GPU: its kernels alone, and a publication into a running SGLang.

    python -m benchmarks.sync_gpu kernels [--sweep]     one GPU with 30 GB; torch, numpy, triton, gcc
    python -m benchmarks.sync_gpu publish               one GPU with 40 GB; torch, numpy, triton, zstandard, gcc; 30 GB of memory
    python -m benchmarks.sync_gpu engine                one GPU with 60 GB, SGLang beside it, 40 GB of disk and 60 of memory; 8 minutes

`kernels`: Qwen3-4B's weights as SGLang holds them (398 Hugging Face tensors in 290 parameters, 8.04 GB of bf16), random bits. The audit
reads all of it; 1.2 % of every tensor, at random places, is read and overwritten. Beside each figure stands what its memory traffic would
take alone. Results are compared bit for bit with torch's indexing and, tensor by tensor, with the fingerprint in C. Times are of the call
from the host, wait included; `device` is the GPU's own, where queued calls hide the host. `publish`, `engine`: see
benchmarks/sync_gpu_publish.py and sync_gpu_engine.py.

Prints a table and writes JSON to $OUT, or else to benchmarks/results. Exit code 1 where a bar fails or bits differ.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
CHANGED = 0.012  # share of the elements that a step changes
SECTOR = 32  # bytes that memory moves at least
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes/s that the maker names
LAYERS, HIDDEN, INNER, HEADS, GROUPS, HEAD_DIM, VOCAB = 36, 2560, 9728, 32, 8, 128, 151936
AUDIT_BAR_MS, SCATTER_BAR_MS = 5.0, 2.0


@dataclass
class Row:
    """A figure beside its floor and its bar; ms."""

    what: str
    ms: float
    device_ms: float | None = None
    floor_ms: float | None = None
    bar_ms: float | None = None

    @property
    def held(self) -> bool:
        return self.bar_ms is None or self.ms <= self.bar_ms


@dataclass
class Report:
    """What is printed and written. `facts` are figures without a bar."""

    name: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what failed, in words

    def expect(self, holds: bool, what: str) -> None:
        print(f"{'ok   ' if holds else 'WRONG'} {what}", flush=True)
        if not holds:
            self.wrong.append(what)

    def finish(self) -> int:
        """Print, write, and tell the exit code."""
        print(f"{'':52} {'ms':>10} {'device':>9} {'floor':>8} {'bar':>7}")
        for row in self.rows:
            cells = [f"{value:.3f}" if value is not None else "" for value in (row.device_ms, row.floor_ms)]
            bar = f"{row.bar_ms:g}" if row.bar_ms is not None else ""
            print(f"{row.what:52} {row.ms:10.3f} {cells[0]:>9} {cells[1]:>8} {bar:>7} {'' if row.held else 'above'}")
        for name, fact in self.facts.items():
            print(f"{name:52} {fact}")
        self.wrong += [f"{row.what}: {row.ms:.3f} ms, to be at most {row.bar_ms:g}" for row in self.rows if not row.held]
        for wrong in self.wrong:
            print(f"missed  {wrong}")
        folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        found = {"rows": [asdict(row) | {"held": row.held} for row in self.rows], "facts": self.facts, "missed": self.wrong}
        (folder / f"{self.name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
        return 1 if self.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "publish", "engine"))
    parser.add_argument("--sweep", action="store_true", help="time the audit for other divisions of its work too")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sync_gpu"), help="where `engine` keeps its checkpoints")
    args = parser.parse_args()
    build_native()
    if args.what == "engine":
        from benchmarks import sync_gpu_engine

        return sync_gpu_engine.run(args.folder, args.layers, args.vocab)
    if args.what == "publish":
        from benchmarks import sync_gpu_publish

        return sync_gpu_publish.run(args.layers, args.vocab)
    return kernels(args.layers, args.vocab, args.sweep)


def build_native() -> None:
    """Compile native.c where no build of it lies beside it."""
    folder = ROOT / "slime" / "sync"
    if not list(folder.glob("_native*.so")):
        target = str(folder / "_native.so")
        subprocess.run(["gcc", "-O3", "-shared", "-fPIC", str(folder / "native.c"), "-o", target], check=True)


# ---- Qwen3-4B, as a checkpoint names it and as SGLang holds it ----


def hf_shapes(layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Every HF tensor; the head is tied."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        inside = {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (GROUPS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (GROUPS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "self_attn.q_norm": (HEAD_DIM,),
            "self_attn.k_norm": (HEAD_DIM,),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return shapes | {"model.norm.weight": (HIDDEN,)}


def live_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """int16 random bits on the GPU, one 1-D view for every HF tensor; q, k, v and gate, up lie in one parameter each."""
    generator = torch.Generator("cuda").manual_seed(seed)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        head, _, last = name.removesuffix(".weight").rpartition(".")
        fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}.get(last, last)
        groups.setdefault(f"{head}.{fused}", []).append(name)
    views = {}
    for names in groups.values():
        sizes = [prod(shapes[name]) for name in names]
        whole = torch.randint(-(1 << 15), 1 << 15, (sum(sizes),), dtype=torch.int16, device="cuda", generator=generator)
        views.update(zip(names, whole.split(sizes), strict=True))
    return {name: views[name] for name in shapes}


# ---- kernels ----


def kernels(layers: int, vocab: int, sweep: bool) -> int:
    from slime.sync import fingerprint
    from slime.sync.kernels.audit import Audit, Plan

    report = Report("sync_gpu_kernels")
    shapes = hf_shapes(layers, vocab)
    live = live_weights(shapes)
    nbytes = sum(view.nbytes for view in live.values())
    name = torch.cuda.get_device_name()
    nominal = next((rate for card, rate in BANDWIDTH.items() if card in name), None)
    copied = copy_rate()
    rate = nominal or copied
    report.facts |= {"device": name, "torch": torch.__version__, "tensors": len(live), "GB": nbytes / 1e9}
    report.facts |= {"floor TB/s, as named": rate / 1e12, "TB/s that a copy reaches": copied / 1e12}

    key = fingerprint.run_key("bench")
    table = fingerprint.table(key)
    keys = [fingerprint.tensor_key(key, tensor) for tensor in shapes]
    runs = whole_runs(live, keys)
    begun = time.perf_counter()
    audit = Audit(runs, table, len(live), "cuda")
    report.facts["plan of the audit, s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    first = audit()
    report.facts["first audit, compilation included, s"] = time.perf_counter() - begun
    expected = [fingerprint.full(view.cpu().numpy().view(np.uint16), k, table) for view, k in zip(live.values(), keys, strict=True)]
    report.expect(first.tolist() == expected, "the audit is the fingerprint in C, every tensor")
    report.rows.append(Row("audit of all", wall(audit), device(audit.start), nbytes / rate * 1e3, AUDIT_BAR_MS))
    half = split_runs(live, shapes, keys)
    of_rank = Audit(half, table, len(live), "cuda")
    bytes_of_rank = int(half["words"].sum()) * 2
    report.rows.append(Row(f"audit of a rank of TP2, {len(half)} runs", wall(of_rank), device(of_rank.start), bytes_of_rank / rate * 1e3))
    if sweep:
        for warps in (1, 2, 4, 8):
            for tile in (32, 64, 128, 256):
                plan = Audit(runs, table, len(live), "cuda", Plan(tile, warps))
                report.expect(plan().tolist() == expected, f"plan {tile} {warps}")
                report.rows.append(Row(f"audit, tiles of {tile} rows, {warps} warps", wall(plan), device(plan.start), nbytes / rate * 1e3))
    scatters(report, live, rate)
    after = audit().tolist()
    mine = [fingerprint.full(view.cpu().numpy().view(np.uint16), k, table) for view, k in list(zip(live.values(), keys, strict=True))[:12]]
    report.expect(after[:12] == mine and after != expected, "the audit sees what was written")
    return report.finish()


def scatters(report: Report, live: dict[str, torch.Tensor], rate: float) -> None:
    """Read and overwrite 1.2 % of every tensor, and compare with torch's indexing."""
    from slime.sync.kernels import scatter
    from slime.sync.staging import SEGMENT

    begun = time.perf_counter()
    scatter.compile_for(torch.device("cuda"), torch.int16)
    report.facts["compiling scatter and gather, s"] = time.perf_counter() - begun
    generator = torch.Generator("cuda").manual_seed(1)
    places = [torch.nonzero(torch.rand(len(view), device="cuda", generator=generator) < CHANGED).flatten() for view in live.values()]
    counts = np.array([len(place) for place in places], np.uint64)
    entries = int(counts.sum())
    segments = np.zeros(len(live), SEGMENT)
    segments["address"], segments["count"], segments["width"] = [view.data_ptr() for view in live.values()], counts, 2
    segments["first"] = segments["at"] = np.cumsum(counts) - counts
    old = torch.cat([view[place] for view, place in zip(live.values(), places, strict=True)])
    new = old ^ torch.randint(1, 1 << 15, (entries,), dtype=torch.int16, device="cuda", generator=generator)
    index = torch.cat([place.to(torch.int32) for place in places])
    sectors = sum(
        len(torch.unique_consecutive((place * 2 + view.data_ptr()) // SECTOR)) for view, place in zip(live.values(), places, strict=True)
    )
    staged = scatter.Scatter(segments, index, new, "cuda")
    back = scatter.Scatter(segments, index, old, "cuda")
    report.expect(torch.equal(staged.read(), old), "what is read is what torch's indexing reads")
    kept = {name: view.clone() for name, view in live.items()}
    staged.write()
    at = 0
    for copy, place in zip(kept.values(), places, strict=True):
        copy[place] = new[at : at + len(place)]
        at += len(place)
    report.expect(all(torch.equal(view, kept[name]) for name, view in live.items()), "what is written is what torch's indexing writes")
    report.facts |= {"entries, millions": entries / 1e6, "staged MB": (index.nbytes + new.nbytes) / 1e6, "sectors, millions": sectors / 1e6}
    floor = (6 * entries + 2 * SECTOR * sectors) / rate * 1e3

    def indexing() -> None:
        at = 0
        for view, place in zip(live.values(), places, strict=True):
            view[place] = new[at : at + len(place)]
            at += len(place)

    def there_and_back() -> None:
        staged.write()
        back.write()

    report.rows.append(Row("write 1.2 %", wall(there_and_back) / 2, device(there_and_back) / 2, floor, SCATTER_BAR_MS))
    report.rows.append(Row("read 1.2 %", wall(staged.read), device(staged.read), (8 * entries + SECTOR * sectors) / rate * 1e3))
    report.rows.append(Row("write 1.2 % by torch's indexing", wall(indexing), device(indexing), floor))
    staged.write()
    report.expect(all(torch.equal(view, kept[name]) for name, view in live.items()), "nothing else was written")
    report.expect(torch.equal(staged.read(), new), "what was written is read")


def whole_runs(live: dict[str, torch.Tensor], keys: list[int]) -> np.ndarray:
    """RUN [tensors]: every tensor, each its own sum."""
    from slime.sync.fingerprint import RUN

    rows = [(view.data_ptr(), 0, len(view), key, out, 2) for out, (view, key) in enumerate(zip(live.values(), keys, strict=True))]
    return np.array(rows, RUN)


def split_runs(live: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], keys: list[int]) -> np.ndarray:
    """RUN [n]: what rank 1 of TP2 would hold, were the memory its own. o_proj and down_proj are split by columns: a run for every row."""
    from slime.sync.fingerprint import RUN

    def runs() -> Iterator[np.ndarray]:
        for out, (name, view) in enumerate(live.items()):
            rows, columns = shapes[name] if len(shapes[name]) == 2 else (2, len(view) // 2)
            by_columns = "o_proj" in name or "down_proj" in name
            first = np.arange(rows, dtype=np.uint64) * columns + columns // 2 if by_columns else np.array([rows // 2 * columns], np.uint64)
            found = np.zeros(len(first), RUN)
            found["address"], found["start"] = first * 2 + view.data_ptr(), first
            found["words"] = columns // 2 if by_columns else (rows - rows // 2) * columns
            found["key"], found["out"], found["size"] = keys[out], out, 2
            yield found

    return np.concatenate(list(runs()))


def wall(call: Callable[[], object], times: int = 20) -> float:
    """ms of a call, its wait included; median."""
    found = []
    call()
    for _ in range(times):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) * 1e3)
    return median(found)


def device(call: Callable[[], object], times: int = 20) -> float:
    """ms of the GPU for a call, many queued; mean."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def copy_rate() -> float:
    """Bytes/s, reads and writes together, of a plain copy."""
    source, target = (torch.empty(1 << 31, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * len(source) / device(lambda: target.copy_(source)) * 1e3


if __name__ == "__main__":
    sys.exit(main())
