"""A publication into a running SGLang on one GPU: `python -m benchmarks.sync_gpu engine`, with stock SGLang 0.5.15.post1 importable.

A server of Qwen3-4B's shape with random weights (A) and `--custom-weight-loader slime.sync.inserver.load`. Version B differs in 1.2 % of
every tensor. B goes through encode_part, decode_part and a staged file into the rank, as a host agent would send it:

    staging       64 requests run twice, undisturbed and while a version is staged again and again: tokens/s
    publication   64 requests run; staged, then pause(in_place) -> commit (write, audit) -> continue; A -> B -> A ...; the
                  same of an idle engine, which drops its prefixes, as in a run with sync.pause=drain
    bits          fingerprints after each commit are those of the tensors on the CPU; at B, SGLang's own checksums of every parameter are
                  those after update_weights_from_disk of B
    beside it     update_weights_from_disk, flattened_bucket over CUDA IPC, xor + zstd decoded into a checkpoint that is reloaded

Bars: the whole pause with its HTTP round trips 30 ms, write 2 ms, audit 5 ms (medians), tokens/s while staging 90 %.
"""

import asyncio
import base64
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.sync_gpu import (
    AUDIT_BAR_MS,
    CHANGED,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    SCATTER_BAR_MS,
    Report,
    Row,
    hf_shapes,
)
from benchmarks.sync_gpu_server import CALL_S, Generation, Server
from slime.sync import fingerprint, wire
from slime.sync.inserver_client import RankClient, RankReply, command
from slime.sync.records import Changes, ModelSpec, TensorSpec
from slime.sync.staging import Stage

TOKENS, TOKENS_OF_COMMITS = 640, 1024
COMMITS, DRAINED = 5, 4  # together odd: the last one leaves B
CALLS, CALLS_BESIDE = ("loads", "pause", "flush", "commit", "continue"), ("pause", "commit", "continue")  # of a drained pause, of others
PAUSE_BAR_MS, THROUGHPUT_BAR = 30.0, 0.9
PART_BYTES = 256 << 20
PIECE = 16 << 20  # elements that xor + zstd packs at a time
RUN_ID = "bench"
KEY = fingerprint.run_key(RUN_ID)


@dataclass
class Versions:
    """Both versions as bits, uint16 1-D a tensor, and what differs."""

    model: ModelSpec
    a: list[np.ndarray]
    b: list[np.ndarray]
    changes: list[Changes]  # A -> B; tensors that have any
    parts: list[bytes]  # A -> B, encoded
    roots: dict[str, list[int]]  # fingerprints of the tensors of "a" and "b"


def run(folder: Path, layers: int, vocab: int) -> int:
    report = Report("sync_gpu_engine")
    folder.mkdir(parents=True, exist_ok=True)
    model = ModelSpec(tuple(TensorSpec(name, shape, "bfloat16") for name, shape in hf_shapes(layers, vocab).items()))
    with phase(report, "checkpoint A"):
        a = random_weights(model)
        write_checkpoint(folder / "a", model, a, layers, vocab)
    (folder / "model.json").write_text(model.to_json())
    server = Server(folder)
    try:
        with phase(report, "version B, its parts and checkpoint"):
            versions = make_versions(model, a, report)
            write_checkpoint(folder / "b", model, versions.b, layers, vocab)
        with phase(report, "server's start, from its process"):
            server.wait()
        Bench(report, server, folder, versions, layers, vocab).measure()
    except BaseException:
        print(server.log_tail(), flush=True)
        raise
    finally:
        server.stop()
    return report.finish()


class Bench:
    """The measurements, in their order."""

    def __init__(self, report: Report, server: Server, folder: Path, versions: Versions, layers: int, vocab: int) -> None:
        self.report, self.server, self.folder, self.versions = report, server, folder, versions
        self.shape = (layers, vocab)
        self.door = RankClient(f"{folder / 'door'}.0", "the rank")
        self.loop = asyncio.new_event_loop()
        self.label, self.count = f"{RUN_ID}/0/0", 0
        self.shared = Path("/dev/shm") if shutil.disk_usage("/dev/shm").free > 2 << 30 else folder

    def measure(self) -> None:
        learned = self.command(
            "learn", socket=str(self.folder / "door"), spec=str(self.folder / "model.json"), run_id=RUN_ID, held=self.label
        )
        self.map = self.ask(self.door.describe()).map
        self.report.facts |= {"learned": learned.seconds, "moves": len(self.map.moves), "opaque": len(self.map.opaque)}
        self.expect_bits(learned, "a", "after learning")
        with phase(self.report, "staged files"):
            self.stages = {"b": self.stage_of(self.decoded()), "a": self.stage_of(turned(self.versions.changes))}
        with phase(self.report, "throughput"):
            self.throughput()
        with phase(self.report, "commits"):
            self.commits()
        with phase(self.report, "checks and other routes"):
            self.other_routes()
        self.loop.run_until_complete(self.door.close())

    # --- the channel ---

    def decoded(self) -> list[Changes]:
        """What a host agent makes of the parts."""
        model, old = self.versions.model, self.versions.a
        ranges = model.parts(PART_BYTES)
        begun = time.perf_counter()
        with pool() as threads:
            decoded = threads.map(
                lambda part, data: list(wire.decode_part(model, part, data, old.__getitem__)), ranges, self.versions.parts
            )
            changes = [change for part in decoded for change in part]
        self.report.facts["decode, s"] = time.perf_counter() - begun
        same = all(
            np.array_equal(x.positions, y.positions) and np.array_equal(x.new, y.new)
            for x, y in zip(changes, self.versions.changes, strict=True)
        )
        self.report.expect(same, "parts decode to what was encoded")
        return changes

    def stage_of(self, changes: Iterable[Changes]) -> Stage:
        begun = time.perf_counter()
        stage = Stage(self.map, KEY)
        for change in changes:
            stage.add(stage.pieces(change))
        self.report.facts["project, s"] = time.perf_counter() - begun
        return stage

    def staged(self, target: str, label: str) -> tuple[float, float]:
        """Write the staged file that leads to a version and have the rank take it; seconds of both."""
        path = self.shared / "slime_bench_staged"
        begun = time.perf_counter()
        self.report.facts["staged MB"] = self.stages[target].write(path, label, self.label) / 1e6
        written = time.perf_counter()
        self.ask(self.door.stage(str(path), label, self.label, CALL_S))
        ended = time.perf_counter()
        path.unlink()
        return written - begun, ended - written

    def throughput(self) -> None:
        """tokens/s of the same work, undisturbed and while staging goes on without rest."""
        Generation(self.server, 32).finish()
        alone = [Generation(self.server, TOKENS).finish() for _ in range(2)][-1]
        path = self.shared / "slime_bench_staged"
        self.stages["b"].write(path, f"{RUN_ID}/0/1", self.label)
        beside, times = Generation(self.server, TOKENS), []
        while beside.running:
            begun = time.perf_counter()
            self.ask(self.door.stage(str(path), f"{RUN_ID}/0/1", self.label, CALL_S))
            times.append(time.perf_counter() - begun)
        path.unlink()
        share = beside.finish() / alone
        self.report.facts |= {
            "tokens/s": alone,
            "tokens/s while staging": share * alone,
            "share": share,
            "staged meanwhile, times": len(times),
            "stage meanwhile, s": {"median": median(times), "longest": max(times)},
        }
        self.report.expect(share >= THROUGHPUT_BAR, f"staging without rest leaves {100 * share:.1f} % of tokens/s, to be at least 90")

    def commits(self) -> None:
        """Pauses with requests that go on afterwards, and drained ones, as a host does by default: nothing runs, prefixes are dropped."""
        bars = {"whole": PAUSE_BAR_MS, "write_s": SCATTER_BAR_MS, "audit_s": AUDIT_BAR_MS}
        names = {"whole": "the whole pause", "write_s": "write", "audit_s": "audit"} | {call: f"{call} call" for call in CALLS}
        generation = Generation(self.server, TOKENS_OF_COMMITS)
        time.sleep(0.5)
        pauses = [self.commit(generation) for _ in range(COMMITS)]
        generation.finish()
        drained = [self.commit() for _ in range(DRAINED)]
        for title, found in (("", pauses), ("drained: ", drained)):
            self.report.facts[f"{title}commits, ms"] = [{name: round(s * 1e3, 2) for name, s in laps.items()} for laps in found]
            for what in filter(found[0].__contains__, names):
                median_s = median(laps[what] for laps in found)
                self.report.rows.append(Row(title + names[what], median_s * 1e3, bar_ms=bars.get(what)))
        self.report.rows.append(Row("the longest whole pause", max(found["whole"] for found in pauses) * 1e3))
        self.report.rows.append(Row("stage beside 64 requests", median(found["stage"] for found in pauses) * 1e3))

    def commit(self, generation: Generation | None = None) -> dict[str, float]:
        """The next version, into an engine that runs requests or is idle; seconds of each call, and what the rank says of its part."""
        target, label = "b" if self.count % 2 == 0 else "a", f"{RUN_ID}/0/{self.count + 1}"
        write_s, stage_s = self.staged(target, label)
        calls: dict[str, Callable[[], Any]] = {
            "loads": lambda: self.server.ask("/v1/loads", "GET"),
            "pause": lambda: self.server.post("/pause_generation", mode="in_place"),
            "flush": lambda: self.server.post("/flush_cache"),
            "commit": lambda: self.send("commit", label, version=label, parent=self.label),
            "continue": lambda: self.server.post("/continue_generation", torch_empty_cache=False),
        }
        if generation is not None:
            self.report.expect(generation.running, "requests run at the pause")
        laps = {"file": write_s, "stage": stage_s}
        begun = last = time.perf_counter()
        for name in CALLS if generation is None else CALLS_BESIDE:
            calls[name]()
            laps[name], last = time.perf_counter() - last, time.perf_counter()
        reply = self.ask(self.door.result(label))
        self.label, self.count = label, self.count + 1
        self.report.expect(reply.ok and reply.held == label, f"{label} is held {reply.error or ''}")
        self.expect_bits(reply, target, f"after commit {self.count}")
        return laps | {"whole": last - begun} | reply.seconds

    # --- the proof, and other ways to the same weights ---

    def other_routes(self) -> None:
        by_delta = self.checksums()
        by_disk = self.from_disk("b", "update_weights_from_disk")
        self.report.expect(self.checksums() == by_delta, f"SGLang's checksums of {len(by_delta)} parameters: delta in place = full reload")
        self.expect_bits(by_disk, "b", "after a full reload of B")
        self.expect_bits(self.from_disk("a", "update_weights_from_disk"), "a", "after a full reload of A")
        self.report.expect(self.checksums() != by_delta, "SGLang's checksums tell A from B")
        self.from_xor()
        self.from_bucket()

    def from_disk(self, version: str, what: str) -> RankReply:
        seconds = self.server.post("/update_weights_from_disk", model_path=str(self.folder / version))
        self.report.rows.append(Row(what, seconds * 1e3))
        return self.command("audit")

    def from_xor(self) -> None:
        """A's bits xor B's, through zstd; decoded into a checkpoint, and that reloaded."""
        import zstandard

        a, b = self.versions.a, self.versions.b
        pieces = [(i, first) for i, bits in enumerate(a) for first in range(0, len(bits), PIECE)]

        def pack(piece: tuple[int, int]) -> bytes:
            i, first = piece
            return zstandard.ZstdCompressor(1).compress(np.bitwise_xor(a[i][first : first + PIECE], b[i][first : first + PIECE]).tobytes())

        def unpack(piece: tuple[int, int], data: bytes) -> None:
            i, first = piece
            np.bitwise_xor(
                made[i][first : first + PIECE], np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint16), out=out(piece)
            )

        def out(piece: tuple[int, int]) -> np.ndarray:
            return made[piece[0]][piece[1] : piece[1] + PIECE]

        with pool() as threads:
            packed = list(threads.map(pack, pieces))
            made = [bits.copy() for bits in a]
            begun = time.perf_counter()
            list(threads.map(unpack, pieces, packed))
        decoded = time.perf_counter()
        write_checkpoint(self.folder / "c", self.versions.model, made, *self.shape)
        written = time.perf_counter()
        reply = self.from_disk("c", "reload, of xor + zstd")
        ended = time.perf_counter()
        self.expect_bits(reply, "b", "after xor + zstd and a reload")
        self.report.facts |= {"xor + zstd MB": sum(map(len, packed)) / 1e6, "our parts MB": sum(map(len, self.versions.parts)) / 1e6}
        self.report.facts |= {"xor + zstd decode, s": decoded - begun, "its checkpoint, s": written - decoded}
        self.report.rows.append(Row("xor + zstd, decoded, written, reloaded", (ended - begun) * 1e3))

    def from_bucket(self) -> None:
        """The dense route of one GPU: a flattened bucket of all tensors, whose CUDA IPC handle is sent."""
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        named = [(spec.name, tensor.cuda()) for spec, tensor in tensors(self.versions.model, self.versions.a).items()]
        begun = time.perf_counter()
        bucket = FlattenedTensorBucket(named_tensors=named)
        content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        torch.cuda.synchronize()  # the other process does not wait for this one's stream
        data = MultiprocessingSerializer.serialize(content, output_str=True)
        made = time.perf_counter()
        self.server.post("/pause_generation", mode="in_place")
        fields = {"serialized_named_tensors": [data], "load_format": "flattened_bucket", "flush_cache": False}
        seconds = self.server.post("/update_weights_from_tensor", **fields)
        self.server.post("/continue_generation", torch_empty_cache=False)
        ended = time.perf_counter()
        self.expect_bits(self.command("audit"), "a", "after a flattened bucket")
        self.report.rows.append(Row("flattened_bucket over CUDA IPC, call", seconds * 1e3))
        self.report.rows.append(Row("flattened_bucket over CUDA IPC, whole pause", (ended - made) * 1e3))
        self.report.facts["flattening, s"] = made - begun

    def checksums(self) -> dict[str, str]:
        answer = self.server.ask("/weights_checker", action="checksum")
        [rank] = answer["ranks"]
        return rank["checksums"]

    def expect_bits(self, reply: RankReply, version: str, when: str) -> None:
        """The moves of every tensor, each source once, add up to its fingerprint on the CPU."""
        sums = [0] * len(self.versions.model.tensors)
        seen = set()
        for move, value in zip(self.map.moves, reply.moves, strict=True):
            if (move.tensor, move.source) not in seen:
                seen.add((move.tensor, move.source))
                sums[move.tensor] = (sums[move.tensor] + value) % 2**64
        self.report.expect(
            reply.ok and not reply.changed and sums == self.versions.roots[version], f"the live bits are {version.upper()}'s {when}"
        )

    # --- calls ---

    def ask(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def send(self, op: str, ident: str, **fields: Any) -> None:
        """A command in the name of an empty tensor."""
        named = [(command(op, id=ident, **fields), torch.empty(0))]
        data = base64.b64encode(pickle.dumps(named)).decode()
        self.server.post(
            "/update_weights_from_tensor", serialized_named_tensors=[data], load_format="slime.sync.inserver.load", flush_cache=False
        )

    def command(self, op: str, **fields: Any) -> RankReply:
        self.send(op, op, **fields)
        reply = self.ask(self.door.result(op))
        if not reply.ok:
            raise RuntimeError(f"{op}: {reply.error}")
        return reply


# ---- weights ----


def random_weights(model: ModelSpec) -> list[np.ndarray]:
    """uint16 1-D a tensor: bf16 as an initialisation would make them."""
    torch.manual_seed(0)
    found = []
    for spec in model.tensors:
        made = torch.ones(spec.shape, device="cuda") if "norm" in spec.name else torch.empty(spec.shape, device="cuda").normal_(0, 0.02)
        found.append(made.to(torch.bfloat16).flatten().view(torch.int16).cpu().numpy().view(np.uint16))
    torch.cuda.empty_cache()
    return found


def make_versions(model: ModelSpec, a: list[np.ndarray], report: Report) -> Versions:
    table = fingerprint.table(KEY)

    def change(i: int) -> Changes:
        rng, size = np.random.default_rng(i), len(a[i])
        gaps = rng.geometric(CHANGED, int(size * CHANGED * 1.1) + 100)
        positions = np.cumsum(gaps, dtype=np.int64) - 1
        positions = positions[positions < size]
        return Changes(i, positions, a[i][positions], a[i][positions] ^ np.uint16(1))

    def changed(change: Changes) -> np.ndarray:
        bits = a[change.tensor].copy()
        bits[change.positions] = change.new
        return bits

    def root(i: int, bits: np.ndarray) -> int:
        return fingerprint.full(bits, fingerprint.tensor_key(KEY, model.tensors[i].name), table)

    numbers = range(len(a))
    with pool() as threads:
        changes = list(threads.map(change, numbers))
        b = list(threads.map(changed, changes))
        roots = {"a": list(threads.map(root, numbers, a)), "b": list(threads.map(root, numbers, b))}
        begun = time.perf_counter()
        ranges = model.parts(PART_BYTES)
        parts = list(threads.map(lambda part: wire.encode_part(model, part, [changes[i] for i in part], "steps"), ranges))
    report.facts |= {"encode, s": time.perf_counter() - begun, "changed, millions": sum(map(len, changes)) / 1e6}
    return Versions(model, a, b, [change for change in changes if len(change)], parts, roots)


def turned(changes: list[Changes]) -> Iterator[Changes]:
    for change in changes:
        yield Changes(change.tensor, change.positions, change.new, change.old)


def tensors(model: ModelSpec, weights: list[np.ndarray]) -> dict[TensorSpec, torch.Tensor]:
    """The same memory as bf16 tensors."""
    return {
        spec: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(spec.shape)
        for spec, bits in zip(model.tensors, weights, strict=True)
    }


def write_checkpoint(path: Path, model: ModelSpec, weights: list[np.ndarray], layers: int, vocab: int) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    named = {spec.name: tensor for spec, tensor in tensors(model, weights).items()}
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


@contextmanager
def phase(report: Report, name: str) -> Iterator[None]:
    begun = time.perf_counter()
    print(f"---- {name}", flush=True)
    yield
    report.facts[f"{name}, s"] = round(time.perf_counter() - begun, 1)
    print(f"     {report.facts[f'{name}, s']} s", flush=True)
