"""`python -m benchmarks.sync_gpu publish`: the trainer's end of a publication on one GPU, from the comparison to finished parts.

Qwen3-4B's weights as Megatron holds them (q, k and v interleaved by group, gate and up one after the other), random bits, beside a
snapshot; then 1.2 % of every tensor, at random places, moves by mostly one unit in the last place. Each stage is timed alone, and all of
them in a row, which has the bar. Every part is compared, byte for byte, with what the encoder on the CPU makes of the same changes, and
decoded by the receiver's decoder; fingerprints are compared with those of all weights before and after.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import prod

import numpy as np
import torch

from benchmarks.sync_gpu import (
    BANDWIDTH,
    CHANGED,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    Report,
    Row,
    copy_rate,
    hf_shapes,
    wall,
)

PUBLISH_BAR_MS = 60.0  # diff and encode
TO_HOST = 50e9  # bytes/s of a copy to page-locked memory, about
PART_BYTES = 256 << 20
TABLE_KEY = 0xBE7C4
DEVICE = "cuda"


class Publisher:
    """What a rank does, stage by stage; each leaves its result for the next."""

    def __init__(self, layers: int, vocab: int) -> None:
        from slime.sync import fingerprint
        from slime.sync.own_blocks import OwnBlocks
        from slime.sync.records import ModelSpec, TensorSpec

        shapes = hf_shapes(layers, vocab)
        self.spec = ModelSpec(tuple(TensorSpec(name, shape, "bfloat16") for name, shape in shapes.items()))
        self.parts = self.spec.parts(PART_BYTES)
        self.table = fingerprint.table(TABLE_KEY)
        self.keys = np.array([fingerprint.tensor_key(TABLE_KEY, name) for name in shapes], np.uint64)
        self.runs, sizes = runs_of(shapes)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.live = [torch.randint(-(1 << 15), 1 << 15, (n,), dtype=torch.int16, device=DEVICE, generator=generator) for n in sizes]
        self.held = [memory.clone() for memory in self.live]
        change(self.live, generator)
        begun = time.perf_counter()
        self.blocks = OwnBlocks.of(self.spec, self.runs, DEVICE)
        self.plan_s = time.perf_counter() - begun
        self.threads = len(os.sched_getaffinity(0))

    def count(self) -> None:
        self.counts = self.blocks.diff.count(self.live, self.held)

    def find(self) -> None:
        self.batches = self.blocks.batches(self.counts)
        self.steps = [self.blocks.steps(batch, self.keys, self.table) for batch in self.batches]

    def fingerprints(self) -> None:
        self.sums = np.zeros(len(self.keys), np.uint64)
        for batch, steps in zip(self.batches, self.steps, strict=True):
            np.add.at(self.sums, self.blocks.tensor[batch], steps.fingerprints())

    def write(self) -> None:
        every = [np.ones(len(batch), bool) for batch in self.batches]
        self.streams = [self.blocks.streams(steps, which) for steps, which in zip(self.steps, every, strict=True)]

    def pack(self) -> None:
        self.coded = [streams.pack(self.threads) for streams in self.streams]

    def code(self) -> None:
        batches, every = self.blocks.batches(self.counts), np.ones(len(self.counts), bool)
        self.coded, self.sums = self.blocks.code(batches, every, self.keys, self.table, self.threads)

    def assemble(self) -> None:
        from slime.sync import wire

        with ThreadPoolExecutor(self.threads) as pool:
            jobs = [
                pool.submit(wire.lay_out(self.spec, tensors, [blocks.of_tensors(tensors) for blocks in self.coded]).join)
                for tensors in self.parts
            ]
            self.payloads = [job.result() for job in jobs]

    def all(self) -> None:
        for stage in (self.count, self.code, self.assemble):
            stage()

    def acknowledge(self) -> None:
        for held, live in zip(self.held, self.live, strict=True):
            held.copy_(live)

    def bits(self, memories: list[torch.Tensor], tensor: int) -> np.ndarray:
        """uint16 [size], an HF tensor on the host."""
        mine = np.flatnonzero(self.runs.tensor == tensor)
        mine = mine[np.argsort(self.runs.source[mine])]
        columns = (self.runs.memory[mine].tolist(), self.runs.offset[mine].tolist(), self.runs.count[mine].tolist())
        found = [memories[memory][offset : offset + count] for memory, offset, count in zip(*columns, strict=True)]
        return torch.cat(found).cpu().numpy().view(np.uint16)


def run(layers: int, vocab: int) -> int:
    report = Report("sync_gpu_publish")
    publisher = Publisher(layers, vocab)
    nbytes, name = publisher.spec.nbytes, torch.cuda.get_device_name()
    rate = next((rate for card, rate in BANDWIDTH.items() if card in name), None) or copy_rate()
    begun = time.perf_counter()
    publisher.all()
    for stage in (publisher.find, publisher.write):
        stage()
    report.facts |= {"device": name, "torch": torch.__version__, "CPU threads": publisher.threads, "GB": nbytes / 1e9}
    report.facts |= {"tensors": len(publisher.spec.tensors), "memories": len(publisher.live), "blocks": len(publisher.counts)}
    report.facts |= {"plan, s": publisher.plan_s, "first time, compilation included, s": time.perf_counter() - begun}
    entries, raw = int(publisher.counts.sum()), sum(len(found.streams) for found in publisher.streams)
    rates = {
        "count what differs": (publisher.count, 2 * nbytes / rate),
        "list and measure it": (publisher.find, (2 * nbytes + 16 * entries) / rate),
        "fingerprints to the host": (publisher.fingerprints, None),
        "write the streams, copy them to the host": (publisher.write, (8 * entries + 2 * raw) / rate + raw / TO_HOST),
        "zstd": (publisher.pack, None),
        "list, write, zstd, a batch after the other": (publisher.code, None),
        "put the parts together": (publisher.assemble, None),
    }
    for what, (stage, floor) in rates.items():
        report.rows.append(Row(what, wall(stage, 7), floor_ms=floor and floor * 1e3))
    report.rows.append(Row("diff and encode", wall(publisher.all, 7), floor_ms=2 * nbytes / rate * 1e3, bar_ms=PUBLISH_BAR_MS))
    sizes = [len(payload) for payload in publisher.payloads]
    report.facts |= {"entries, millions": entries / 1e6, "MB of streams": raw / 1e6, "MB of parts": sum(sizes) / 1e6}
    report.facts |= {"bytes an entry": sum(sizes) / entries, "parts": len(sizes)}
    verify(report, publisher)
    report.rows.append(Row("snapshot := weights", wall(publisher.acknowledge, 7), floor_ms=2 * nbytes / rate * 1e3))
    publisher.count()
    report.expect(not publisher.counts.any(), "nothing differs from the snapshot afterwards")
    return report.finish()


def runs_of(shapes: dict[str, tuple[int, ...]]):  # type: ignore[no-untyped-def]
    """The HF tensors' runs in Megatron's parameters of one rank, and the sizes of these."""
    from slime.sync.own_blocks import Runs
    from slime.sync.records import BLOCK

    sizes: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    queries, unit = HEADS // GROUPS, HEAD_DIM * HIDDEN  # heads of a group; elements of a head
    heads = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}  # of a group: the first, and how many
    for tensor, (name, shape) in enumerate(shapes.items()):
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last in ("k_proj", "v_proj", "up_proj"):
            sizes[-1] += prod(shape)  # the parameter that q_proj or gate_proj has begun
        else:
            sizes.append(prod(shape))
        memory = len(sizes) - 1
        if last in heads:
            (first, number), stride = heads[last], (queries + 2) * unit
            pieces = [(group * stride + first * unit, group * number * unit, number * unit) for group in range(GROUPS)]
        else:
            pieces = [(sizes[-1] - prod(shape), 0, prod(shape))]
        for offset, source, count in pieces:
            edges = np.unique([source, *range(-(-source // BLOCK) * BLOCK, source + count, BLOCK), source + count]).tolist()
            rows += [(memory, offset + low - source, tensor, low, high - low) for low, high in pairwise(edges)]
    return Runs(*np.array(rows, np.int64).T), sizes


def change(memories: list[torch.Tensor], generator: torch.Generator) -> None:
    """Moves CHANGED of each by units in the last place: one of ten by more than one, a few by more than 256."""
    for memory in memories:
        for part in memory.split(1 << 26):
            there = torch.nonzero(torch.rand(len(part), device=DEVICE, generator=generator) < CHANGED).flatten()
            luck = torch.rand(len(there), device=DEVICE, generator=generator)
            far = torch.where(luck < 0.09, 2, torch.where(luck < 0.0995, 7, torch.where(luck < 0.1, 300, 1)))
            sign = torch.randint(0, 2, (len(there),), device=DEVICE, generator=generator) * 2 - 1
            part[there] += (far * sign).to(torch.int16)


def verify(report: Report, publisher: Publisher) -> None:
    """Against the CPU's encoder and the receiver's decoder."""
    from slime.sync import native, wire
    from slime.sync.kernels.audit import Audit
    from slime.sync.records import Changes

    seconds: list[float] = []

    def check(number: int) -> tuple[bool, bool]:
        tensors = publisher.parts[number]
        olds, news = ({t: publisher.bits(side, t) for t in tensors} for side in (publisher.held, publisher.live))
        begun = time.perf_counter()
        changes = []
        for tensor in tensors:
            at = native.diff(olds[tensor], news[tensor])
            changes.append(Changes(tensor, at, olds[tensor][at], news[tensor][at]))
        expected = wire.encode_part(publisher.spec, tensors, changes, "steps")
        seconds.append(time.perf_counter() - begun)
        for found in wire.decode_part(publisher.spec, tensors, publisher.payloads[number], olds.__getitem__):
            olds[found.tensor][found.positions] = found.new
        return publisher.payloads[number] == expected, all(np.array_equal(olds[t], news[t]) for t in tensors)

    with ThreadPoolExecutor(min(8, publisher.threads)) as pool:
        found = list(pool.map(check, range(len(publisher.parts))))
    report.expect(all(same for same, _ in found), "every part is, byte for byte, the CPU encoder's")
    report.expect(all(decoded for _, decoded in found), "every part decodes to the new weights")
    report.facts["diff and encode on the CPU, s, added up over threads"] = sum(seconds)
    sums = []
    for side in (publisher.held, publisher.live):
        from slime.sync.fingerprint import RUN

        runs = np.zeros(len(publisher.runs.tensor), RUN)
        bases = np.array([memory.data_ptr() for memory in side], np.uint64)
        runs["address"] = bases[publisher.runs.memory] + 2 * publisher.runs.offset.astype(np.uint64)
        runs["start"], runs["words"] = publisher.runs.source, publisher.runs.count
        runs["key"], runs["out"], runs["size"] = publisher.keys[publisher.runs.tensor], publisher.runs.tensor, 2
        sums.append(Audit(runs, publisher.table, len(publisher.keys), DEVICE)())
    report.expect(np.array_equal(sums[0] + publisher.sums, sums[1]), "fingerprints follow from the changes, every tensor")
