"""From the trainer's new weights to an engine that generates with them: slime's weight channel beside what others do, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.sync_e2e [--versions 5] [--layers 14 --hidden 768 --vocab 16384]

A stock SGLang on the CPU serves a Qwen3 of some 110 million bf16 parameters. Adam (0.9, 0.98) is simulated with fp32 masters that lie
anywhere in their bf16 cell; its consecutive steps are the versions: at lr 1e-6, and at rates for about .1, 1, 3 and 10 % changed elements;
at 100 % weights are drawn anew. Every version goes through every route, from the same old weights to the same new ones, and the engine's
live bits are proven to be the new ones, by the audit of slime, after each. Between two routes the old weights are put back.

    delta, steps | exponent    the channel as it is: diff, encode; check, decode, stage beside the weights; pause: write, audit, compare
    full, proven               sync.mode=full: stock update of all tensors, audit, compare
    full, stock update         all tensors through /update_weights_from_tensor, believed
    xor + zstd-1, reload       decoded into a local checkpoint in shared memory; /update_weights_from_disk (what slime ships)
    COO u32 + bf16             dense tensors of NaN and values through model.load_weights, all elements (verl, vLLM)
    gap16 + xor + zstd-1       decoded to whole tensors, which go through model.load_weights (NeMo-RL)

Rivals are spared what measuring does not need: checksums, proofs, aborted requests, flushed caches; what can be done before the pause is
done there, and their tensors reach the engine's process through shared memory. The stock update alone carries tensors as text in a request,
its only way into a server on a CPU: how long a dense load lasts without that is the pause of gap16. Nothing crosses a network.
`sender` is CPU time of finding and encoding the difference; `before` what receivers do while the engine generates; `pause` from asking it
to stop until it goes on, of ours the audit included; `after` what the channel does then (the host copy becomes the version); `total` is
sender, before and pause on the clock; `at 1 Gb/s` adds the wire's time at that rate. Medians: of --versions where there are bars, else of
half as many; the full routes, whose cost no version changes, are measured once in all. No request runs: every pause is at its shortest.

Bars, at 1 and 3 % and at lr 1e-6: both deltas have the smallest wire, and a pause within a quarter of the shortest. Prints a table, writes
benchmarks/results/sync_e2e.json; exit code 1 where a bar fails or bits differ.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import rivals
from benchmarks.real_steps import Shape
from benchmarks.sync_codec import BETAS, EPS, RATES, bits_of
from slime.engine.host_copy import tensor_of
from slime.engine.live import Written
from slime.sync import buckets, fingerprint, native, wire
from slime.sync.channel import Channel
from slime.sync.diff import Delta, Grid, Summary
from slime.sync.manifest import PartRef, root_of
from slime.sync.records import Changes, ModelSpec
from slime.types import WeightVersion
from tests.engine import servers
from tests.engine.weights_double import RUN_ID, TIMEOUT_S, Bits, Host
from tests.tiny import make_tokenizer

RESULTS = Path(__file__).parent / "results"
SHARED = Path("/dev/shm")
STEPS, EXPONENT, PROVEN = "delta, steps (ours, default)", "delta, exponent (ours)", "full, proven (ours)"
STOCK, XOR = "full, stock update", "xor + zstd-1, reload (slime)"
COO, GAP16 = "COO u32 + bf16 (verl, vLLM)", "gap16 + xor + zstd-1 (NeMo-RL)"
ROUTES = (STEPS, EXPONENT, PROVEN, STOCK, XOR, COO, GAP16)
LR = "Adam, lr 1e-6"
CASES: dict[str, float | None] = {LR: 1e-6, **{f"{density:.1%}": RATES[density] for density in (0.001, 0.01, 0.03, 0.1)}, "100.0%": None}
BARRED = (LR, "1.0%", "3.0%")
BUCKET_BYTES = 256 << 20
WARM_UP = 30  # steps of Adam before the first version
CHUNK = 1 << 22
GBIT = 1e9 / 8
Tensors = list[np.ndarray]  # uint16 bits of every tensor, flat


@dataclass
class Cost:
    """What one version cost on one route; seconds."""

    wire: int
    sender: float  # CPU time
    encode: float  # the same on the clock
    before: float
    pause: float
    after: float = 0.0
    write: float = 0.0
    audit: float = 0.0

    @property
    def total(self) -> float:
        return self.encode + self.before + self.pause


@dataclass(frozen=True)
class Row:
    """Medians of a route over the versions of a case."""

    case: str
    changed: float
    route: str
    wire_bytes: float
    of_full: float
    sender_cpu_s: float
    before_s: float
    pause_s: float
    after_s: float
    total_s: float
    at_1_gbit_s: float
    shortest_pause_s: float
    longest_pause_s: float
    write_s: float
    audit_s: float
    versions: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=5, help="of a case that has bars")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=16384)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=SHARED) as scratch:
        rows, facts = run(args, Path(scratch))
    failed = missed(rows)
    facts["wall, s"] = round(time.perf_counter() - begun, 1)
    console = Console(width=170)
    console.print(table(rows, facts))
    for line in failed:
        console.print(f"missed: {line}")
    RESULTS.mkdir(exist_ok=True)
    found = {"facts": facts, "rows": [asdict(row) for row in rows], "missed": failed}
    (RESULTS / "sync_e2e.json").write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


def run(args: argparse.Namespace, scratch: Path) -> tuple[list[Row], dict[str, Any]]:
    shape = Shape(args.layers, args.hidden, args.vocab, head_dim=64, scaled=False)
    shape.write(scratch / "model")
    make_tokenizer(scratch / "model", 80)
    cfg = servers.recipe(scratch / "model", sglang={"custom_weight_loader": [rivals.LOADER]})
    cfg.model.dtype, cfg.sync.pause = "bf16", "in_place"
    trainer = Trainer(scratch / "model")
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(Adam, trainer.now)
        server = servers.start(cfg, scratch / "engine.log")
    try:
        with Host(cfg, [server]) as host:
            adam = begun.result()
            trainer.now = adam.weights()
            bench = Bench(cfg, host, trainer, scratch)
            bench.begin()
            rows = [
                row
                for case, rate in CASES.items()
                for row in bench.case(case, adam, rate, args.versions if case in BARRED else (args.versions + 1) // 2)
            ]
            facts = {
                "sglang": server.spec.endpoint.sglang,
                "parameters": sum(bits.size for bits in trainer.now),
                "full_bytes": trainer.spec().nbytes,
                "proofs": bench.proofs,
            }
    finally:
        server.stop()
    return rows, facts


class Adam:
    """Masters and Adam's state of every tensor; `step` moves on by one."""

    def __init__(self, tensors: Tensors) -> None:
        self.generator = torch.Generator().manual_seed(7)
        rounded = torch.from_numpy(np.concatenate(tensors).view(np.int16)).view(torch.bfloat16).float()
        self.ends = np.cumsum([bits.size for bits in tensors])[:-1]
        n = len(rounded)
        cell = torch.exp2(torch.floor(torch.log2(rounded.abs().clamp_min(1e-30))) - 7)
        self.master = rounded + (torch.rand(n, generator=self.generator) - 0.5) * cell * 0.999
        self.mean, self.m, self.v, self.steps = 0.2 * self.noise(n), torch.zeros(n), torch.zeros(n), 0
        for _ in range(WARM_UP):
            self.step(0.0)

    def noise(self, n: int) -> torch.Tensor:
        return torch.randn(n, generator=self.generator)

    def step(self, rate: float | None) -> None:
        """One step; without a rate the weights are drawn anew, so that all differ."""
        if rate is None:
            old = bits_of(self.master)
            new = bits_of(self.noise(len(old)) * 0.02)
            new[new == old] ^= 1
            self.master = torch.from_numpy(new.view(np.int16)).view(torch.bfloat16).float()
            return
        self.steps += 1
        shares = [1 - beta**self.steps for beta in BETAS]
        for first in range(0, len(self.master), CHUNK):  # which stays in the cache
            m, v, mean, master = (x[first : first + CHUNK] for x in (self.m, self.v, self.mean, self.master))
            gradient = self.noise(len(m)).add_(mean)
            m.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            if rate:
                master.addcdiv_(m, (v / shares[1]).sqrt_().add_(EPS), value=-rate / shares[0])

    def weights(self) -> Tensors:
        return np.split(bits_of(self.master), self.ends)


class Trainer(Bits):
    """Publishes as a rank of the trainer does (slime/trainer/publish.py), and tells what that took."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.cpu = self.wall = 0.0  # of the last publication

    def take_base(self, run_id: str) -> Sequence[int]:
        self.prints = list(super().take_base(run_id))
        self.keys = [fingerprint.tensor_key(self._key, spec.name) for spec in self._spec.tensors]
        return self.prints

    def delta(self, version: WeightVersion, codec: str, part_bytes: int) -> Delta:
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        grid, found, prints = Grid.of(self._spec), [], list(self.prints)
        changed = []
        for number, (old, new) in enumerate(zip(self.held, self.now, strict=True)):
            at = native.diff(old, new)
            changed.append(len(at))
            after, before = (fingerprint.at(at, bits[at], self.keys[number], self._table) for bits in (new, old))
            prints[number] = (prints[number] + after - before) % 2**64
            at = self._listed(at, grid, number, old.size)
            found.append(Changes(number, at, old[at], new[at]))
        parts = self._spec.parts(part_bytes)
        payloads = [wire.encode_part(self._spec, part, [found[i] for i in part], codec, self.held.__getitem__) for part in parts]
        refs = tuple(PartRef.of(number, payload) for number, payload in enumerate(payloads))
        self.ahead = prints
        summary = Summary(tuple(prints), root_of(self.prints), tuple(changed), 0, 0.0, 0.0, 0.0)
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()
        self.bytes_sent = sum(map(len, payloads))
        return Delta(payloads, refs, summary)  # type: ignore[arg-type]  # bytes where Ray has references

    def _listed(self, at: np.ndarray, grid: Grid, number: int, size: int) -> np.ndarray:
        """With all elements of the blocks in which many changed."""
        of_tensor = slice(grid.first[number], grid.first[number + 1])
        counts = np.zeros(grid.blocks, np.int64)
        counts[of_tensor] = np.bincount(at // wire.BLOCK, minlength=of_tensor.stop - of_tensor.start)
        complete = grid.complete(counts)[of_tensor]
        if complete.all():
            return np.arange(size)
        return np.union1d(at, np.flatnonzero(np.repeat(complete, grid.sizes[of_tensor]))) if complete.any() else at

    def acknowledge(self, version: WeightVersion) -> None:
        super().acknowledge(version)
        self.prints = self.ahead

    def weights(self, version: WeightVersion, bucket_bytes: int) -> Iterator[Any]:
        self.cpu = self.wall = 0.0
        gathered = super().weights(version, bucket_bytes)
        while True:
            cpu, wall = time.process_time(), time.perf_counter()
            bucket = next(gathered, None)
            self.cpu, self.wall = self.cpu + time.process_time() - cpu, self.wall + time.perf_counter() - wall
            if bucket is None:
                self.ahead = self.fingerprints(self.now)
                return
            yield bucket


class Checkpoint:
    """A model directory in shared memory whose tensors can be written in place."""

    def __init__(self, trainer: Bits, directory: Path, model: Path) -> None:
        self.path = trainer.export(directory, model)
        file = self.path / "model.safetensors"
        head = int.from_bytes(file.read_bytes()[:8], "little")
        described = json.loads(file.read_bytes()[8 : 8 + head])
        flat = np.memmap(file, np.uint8, "r+", offset=8 + head)
        self.tensors = [flat[slice(*described[spec.name]["data_offsets"])].view(np.uint16) for spec in trainer.spec().tensors]

    def put(self, tensors: Tensors) -> None:
        for here, bits in zip(self.tensors, tensors, strict=True):
            here[:] = bits


class Bench:
    """The measurements."""

    def __init__(self, cfg: Any, host: Host, trainer: Trainer, scratch: Path) -> None:
        self.cfg, self.host, self.trainer, self.scratch = cfg, host, trainer, scratch
        self.spec: ModelSpec = trainer.spec()
        self.live = host.live[0]
        self.number = self.proofs = 0

    def begin(self) -> None:
        """Open the channel, and bring the engine to the simulation's first weights."""
        first, self.trainer.now = self.trainer.now, self.trainer.held
        self.channel = Channel(self.cfg.sync, self.trainer, self.host, WeightVersion(0, 0, RUN_ID))
        self.channel.open()
        self.checkpoint = Checkpoint(self.trainer, self.scratch / "checkpoint", self.scratch / "model")
        (self.scratch / "coo").mkdir()
        self.publish(first, STEPS)
        self.checkpoint.put(first)

    def case(self, case: str, adam: Adam, rate: float | None, versions: int) -> list[Row]:
        costs: dict[str, list[Cost]] = {route: [] for route in ROUTES}
        changed = []
        for _ in range(versions):
            old = self.trainer.now
            adam.step(rate)
            new = adam.weights()
            changed.append(sum(int((a != b).sum()) for a, b in zip(old, new, strict=True)) / sum(a.size for a in old))
            for route, cost in self.version(old, new, full=case == LR and len(changed) == 1):
                costs[route].append(cost)
        rows = [self.row(case, median(changed), route, costs[route]) for route in ROUTES if costs[route]]
        shown = "   ".join(f"{row.route.split(' (')[0]} {row.pause_s * 1e3:.0f}" for row in rows)
        print(f"{case:14} changed {rows[0].changed:8.3%}   pauses, ms: {shown}", flush=True)
        return rows

    def row(self, case: str, changed: float, route: str, costs: list[Cost]) -> Row:
        def middle(of: Callable[[Cost], float]) -> float:
            return median(of(cost) for cost in costs)

        size = middle(lambda c: c.wire)
        return Row(
            case=case,
            changed=changed,
            route=route,
            wire_bytes=size,
            of_full=size / self.spec.nbytes,
            sender_cpu_s=middle(lambda c: c.sender),
            before_s=middle(lambda c: c.before),
            pause_s=middle(lambda c: c.pause),
            after_s=middle(lambda c: c.after),
            total_s=middle(lambda c: c.total),
            at_1_gbit_s=middle(lambda c: c.total + c.wire / GBIT),
            shortest_pause_s=min(c.pause for c in costs),
            longest_pause_s=max(c.pause for c in costs),
            write_s=middle(lambda c: c.write),
            audit_s=middle(lambda c: c.audit),
            versions=len(costs),
        )

    def version(self, old: Tensors, new: Tensors, full: bool) -> Iterator[tuple[str, Cost]]:
        """One version on every route, the full ones if asked; at the end the channel and the engine hold it."""
        self.prints = self.trainer.fingerprints(new)
        measures = {STOCK: self.stock} if full else {}
        for route, measure in (measures | {XOR: self.xor, COO: self.coo, GAP16: self.gap16}).items():
            yield route, measure(old, new)
            self.prove()
            self.put_back(old)
        for route in (PROVEN, STEPS, EXPONENT) if full else (STEPS, EXPONENT):
            yield route, self.publish(new, route)
            self.prove()
            if route != EXPONENT:
                self.publish(old, STEPS)
        self.checkpoint.put(new)

    # --- ours -------------------------------------------------------------------------------------------------------

    def publish(self, tensors: Tensors, route: str) -> Cost:
        trainer, sync = self.trainer, self.cfg.sync
        trainer.now = tensors
        sync.mode, sync.codec = ("full" if route == PROVEN else "delta"), ("exponent" if route == EXPONENT else "steps")
        self.number += 1
        said = self.channel.publish(self.number)
        if route == PROVEN:
            trainer.acknowledge(WeightVersion(0, self.number))
            before = said["sync/gather_s"] - trainer.wall + said["sync/stage_s"]
        else:
            before = said["sync/decode_s"] + said["sync/stage_s"]
        cost = Cost(int(said["sync/wire_bytes"]), trainer.cpu, trainer.wall, before, said["sync/pause_s"])
        cost.write, cost.audit = said["sync/commit_s"], said["sync/verify_s"]
        cost.after = said["time/sync_s"] - cost.total
        return cost

    # --- others -----------------------------------------------------------------------------------------------------

    def stock(self, old: Tensors, new: Tensors) -> Cost:
        with Clock() as sender:
            copies = [tensor_of(self.spec, i, bits.copy()) for i, bits in enumerate(new)]
        with Clock() as before:
            named = [(spec.name, tensor) for spec, tensor in zip(self.spec.tensors, copies, strict=True)]
            parts = self.spec.parts(BUCKET_BYTES)
            payloads = [buckets.serialise(named[part.start : part.stop]) for part in parts]
        pause = self.paused(lambda: self.updates([([payload], None) for payload in payloads]))
        return Cost(self.spec.nbytes, sender.cpu, sender.wall, before.wall, pause)

    def xor(self, old: Tensors, new: Tensors) -> Cost:
        sent, sender, before = self.through(rivals.Xor, old, new)
        fields = {"model_path": str(self.checkpoint.path), "flush_cache": False}
        pause = self.paused(lambda: self.live._control._call("POST", "/update_weights_from_disk", fields))
        return Cost(sent, sender.cpu, sender.wall, before.wall, pause)

    def gap16(self, old: Tensors, new: Tensors) -> Cost:
        sent, sender, before = self.through(rivals.Gap16, old, new)
        pause = self.paused(lambda: self.loaded(f"whole:{self.checkpoint.path}"))
        return Cost(sent, sender.cpu, sender.wall, before.wall, pause)

    def coo(self, old: Tensors, new: Tensors) -> Cost:
        with Clock() as sender:
            sent = [rivals.Coo(a, b).encode() for a, b in zip(old, new, strict=True)]
        with Clock() as before:
            folder, counts = self.scratch / "coo", [len(values) // 2 for _, values in sent]
            np.save(folder / "positions.npy", np.frombuffer(b"".join(positions for positions, _ in sent), np.uint32))
            np.save(folder / "values.npy", np.frombuffer(b"".join(values for _, values in sent), np.uint16))
            lines = [f"{spec.name} {n} {' '.join(map(str, spec.shape))}" for spec, n in zip(self.spec.tensors, counts, strict=True)]
            (folder / "tensors").write_text("\n".join(lines))
        pause = self.paused(lambda: self.loaded(f"coo:{folder}"))
        return Cost(6 * sum(counts), sender.cpu, sender.wall, before.wall, pause)

    def through(self, way: type[rivals.Way], old: Tensors, new: Tensors) -> tuple[int, "Clock", "Clock"]:
        """(bytes, sender, receiver) of an encoding that is decoded into the checkpoint."""
        with Clock() as sender:
            sent = [way(a, b).encode() for a, b in zip(old, new, strict=True)]
        with Clock() as before:
            for number, (payload, here) in enumerate(zip(sent, self.checkpoint.tensors, strict=True)):
                way(old[number], new[number]).decode(payload, here)
        return sum(len(stream) for payload in sent for stream in payload), sender, before

    # --- the engine -------------------------------------------------------------------------------------------------

    def paused(self, do: Callable[[], Coroutine[Any, Any, Any]]) -> float:
        """Seconds that the engine stands still for it."""

        async def within() -> float:
            begun = time.perf_counter()
            await self.live.pause("in_place", TIMEOUT_S)
            await do()
            await self.live.resume()
            return time.perf_counter() - begun

        return self.host.run(within())

    async def updates(self, calls: list[tuple[list[str], str | None]]) -> None:
        async with self.live._session():
            for payloads, loader in calls:
                await self.live._control.update(payloads, None, False, TIMEOUT_S, loader)

    async def loaded(self, what: str) -> None:
        """An update of an empty tensor, whose name tells benchmarks.rivals what to load."""
        await self.updates([([buckets.serialise([(what, torch.empty(0))])], rivals.LOADER)])

    def prove(self) -> None:
        """Raises AssertionError unless the engine's live bits are the new version's."""
        written = self.host.run(self.live._write("audit", None, False, TIMEOUT_S))
        self.expect(written, self.prints)
        self.proofs += 1

    def put_back(self, old: Tensors) -> None:
        """The engine holds again what the channel knows it to hold."""
        copy = self.host.weights.copy
        self.checkpoint.put(old)
        self.paused(lambda: self.loaded(f"whole:{self.checkpoint.path}"))
        written = self.host.run(self.live._write("audit", copy.label, False, TIMEOUT_S, version=copy.label))
        self.expect(written, copy.fingerprints)

    def expect(self, written: Written, prints: Sequence[int]) -> None:
        """Raises AssertionError for an audit that says otherwise of any tensor."""
        proof = self.live.proof
        assert proof is not None and not proof.opaque and not written.errors, written.errors
        assert not (wrong := proof.wrong(written.fingerprints, prints)), f"live bits of {wrong} are not the trainer's"


class Clock:
    """Seconds of its body, of the CPU and on the clock."""

    def __enter__(self) -> "Clock":
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()


TIE = 1.25  # of the shortest pause: on a CPU a load from shared memory costs about what writing in place and an audit do


def missed(rows: list[Row]) -> list[str]:
    """The bars that do not hold."""
    found = []
    for case in BARRED:
        of = {row.route: row for row in rows if row.case in (LR, case)}  # where a route was measured again, the later one
        others = [row for row in of.values() if row.route not in (STEPS, EXPONENT)]
        least, shortest = min(others, key=lambda row: row.wire_bytes), min(others, key=lambda row: row.pause_s)
        for row in (of[STEPS], of[EXPONENT]):
            if row.wire_bytes >= least.wire_bytes:
                found.append(f"{row.route}, {case}: {row.wire_bytes:.0f} bytes, {least.route} sends {least.wire_bytes:.0f}")
            if row.pause_s > TIE * shortest.pause_s:
                found.append(f"{row.route}, {case}: a pause of {row.pause_s * 1e3:.1f} ms, {shortest.route} {shortest.pause_s * 1e3:.1f}")
    return found


def table(rows: list[Row], facts: dict[str, Any]) -> Table:
    title = f"{facts['parameters'] / 1e6:.0f} M bf16 parameters into SGLang {facts['sglang']} on a CPU, seconds"
    made = Table(title=title)
    for head in ("weights", "changed", "route"):
        made.add_column(head)
    for head in ("wire MB", "of full", "sender", "before", "pause", "of it write", "audit", "shortest", "after", "total", "at 1 Gb/s"):
        made.add_column(head, justify="right")
    for row in rows:
        first = (row.case, f"{row.changed:.3%}") if row.route == STEPS else ("", "")
        pauses = (row.pause_s, row.write_s, row.audit_s, row.shortest_pause_s)
        seconds = (row.sender_cpu_s, row.before_s, *pauses, row.after_s, row.total_s, row.at_1_gbit_s)
        sizes = (f"{row.wire_bytes / 1e6:.3f}", f"1/{1 / row.of_full:.0f}" if row.of_full < 0.5 else f"{row.of_full:.2f}")
        made.add_row(*first, row.route, *sizes, *(f"{s:.3f}" if s else "" for s in seconds), end_section=row.route == ROUTES[-1])
    return made


if __name__ == "__main__":
    sys.exit(main())
