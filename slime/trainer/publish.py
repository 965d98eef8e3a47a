"""The trainer's end of the weight channel on one rank: a snapshot of what every engine holds, and what has changed since.

    take_base     keeps the bits of this rank's slice of the model and computes every tensor's fingerprint, once
    encode        compares, counts what changed over all ranks, codes what this rank holds whole, exchanges that and the changes of all
                  else so that one rank has all of a part, encodes the rest and puts it together
    acknowledge   makes the published weights the snapshot

What was published and not acknowledged is forgotten: the next publication is a difference to the same snapshot.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.sync import fingerprint, wire
from slime.sync.diff import Grid, Summary
from slime.sync.kernels.audit import Audit
from slime.sync.manifest import root_of
from slime.sync.own_blocks import OwnBlocks
from slime.sync.records import Changes, ModelSpec
from slime.trainer import device as devices
from slime.trainer.distributed import Parallel
from slime.trainer.model import Model
from slime.trainer.publish_exchange import gather_blocks, gather_changes, gather_tensors
from slime.trainer.publish_slices import Piece, Stretches, model_spec, own_pieces, runs_of_pieces
from slime.trainer.state import Trainer


@dataclass(frozen=True, slots=True)
class Pending:
    """What was published and waits for its acknowledgement."""

    taken_at: tuple[int, int]  # version and optimizer steps of the trainer
    fingerprints: np.ndarray  # uint64 [tensors]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where something changed since the snapshot: over all ranks, but for `batches`, which are of this rank's blocks."""

    counts: np.ndarray  # int64 [blocks], elements that changed
    complete: np.ndarray  # bool [blocks], whether a block is listed whole
    coded: np.ndarray  # bool [blocks], whether the one rank that holds a block codes it
    batches: list[np.ndarray]


@dataclass(slots=True)
class Snapshot:
    """The last version that every engine holds: this rank's slice of it, 1/DP of the bytes of its shard."""

    spec: ModelSpec
    grid: Grid
    pieces: list[Piece]
    blocks: OwnBlocks
    whole: np.ndarray  # bool [blocks], whether one rank holds all of a block
    held: list[Tensor]  # bits of each piece, as integers
    keys: np.ndarray  # uint64 [tensors], of their fingerprints
    table: np.ndarray  # of fingerprints
    fingerprints: np.ndarray  # uint64 [tensors], of the whole tensors
    pending: Pending | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held)

    def live(self, shards: dict[str, Tensor]) -> list[Tensor]:
        """What the shards hold of each piece, as integers: views, but for what is published in another dtype."""
        return [piece.bits_of(shards) for piece in self.pieces]


def take_base(model: Model, parallel: Parallel, run_id: str, on_host: bool = False) -> Snapshot:
    """The weights as they are, as snapshot: on the model's device, or in (on CUDA pinned) host memory. All ranks call it together."""
    spec = model_spec(model)
    signatures: list[str] = [""] * parallel.world
    dist.all_gather_object(signatures, spec.signature)
    assert len(set(signatures)) == 1, f"ranks see different models: {signatures}"
    key, grid = fingerprint.run_key(run_id), Grid.of(spec)
    keys, table = np.array([fingerprint.tensor_key(key, tensor.name) for tensor in spec.tensors], np.uint64), fingerprint.table(key)
    pieces, shards = own_pieces(model, parallel, spec), _shards(model)
    blocks = OwnBlocks.of(spec, runs_of_pieces(pieces), model.device)
    live = [piece.bits_of(shards) for piece in pieces]
    held, owned, whole = [_keep(bits, on_host) for bits in live], np.zeros(len(keys), np.uint64), np.zeros(grid.blocks, np.uint64)
    np.add.at(owned, blocks.tensor, blocks.held.astype(np.uint64))
    whole[blocks.number] = blocks.whole
    sums = _full(pieces, live, keys, table, model.device)
    sums, owned, whole = np.split(_sum_over_ranks(np.concatenate([sums, owned, whole]), model.device), [len(keys), 2 * len(keys)])
    wrong = [tensor.name for tensor, n in zip(spec.tensors, owned.tolist(), strict=True) if tensor.size != n]
    assert not wrong, f"not every element has one rank that publishes it: {wrong}"
    return Snapshot(spec, grid, pieces, blocks, whole > 0, held, keys, table, sums)


def encode(snapshot: Snapshot, trainer: Trainer, codec: str, part_bytes: int, threads: int = 1) -> tuple[list[tuple[int, bytes]], Summary]:
    """The difference between the trainer's weights and the snapshot: (number, bytes) of the parts that this rank encodes, ascending, and
    the summary, which all ranks get. With codec "dense" all elements are listed, whether they changed or not. `threads` parts are encoded
    at a time. All ranks call it together."""
    device, parts = trainer.model.device, snapshot.spec.parts(part_bytes)
    live = snapshot.live(_shards(trainer.model))  # is read again, by its addresses, until all parts are there
    times = [time.perf_counter()]
    difference = _compare(snapshot, live, codec, device)
    times.append(time.perf_counter())
    mine = difference.coded[snapshot.blocks.number]
    coded, fingerprints = snapshot.blocks.code(difference.batches, mine, snapshot.keys, snapshot.table, threads)
    fingerprints = snapshot.fingerprints + _sum_over_ranks(fingerprints, device)
    times.append(time.perf_counter())
    coded = gather_blocks(parts, coded, device)
    times.append(time.perf_counter())
    diff_s, encode_s, exchange_s = np.diff(times).tolist()
    encoded: list[tuple[int, bytes]] = []
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        for number, changes, old, seconds in _own_parts(snapshot, difference, codec, parts, device):
            exchange_s, encode_s = exchange_s + seconds, encode_s - seconds
            if number is not None:
                found = [blocks.of_tensors(parts[number]) for blocks in coded]
                if changes:
                    waiting.append((number, pool.submit(_encode_part, snapshot.spec, parts[number], found, changes, codec, old)))
                else:  # but for the joining it is Python's work, for which threads would take turns
                    waiting.append((number, pool.submit(wire.lay_out(snapshot.spec, parts[number], found).join)))
            while len(waiting) > threads:
                first, part = waiting.popleft()
                encoded.append((first, part.result()))
        encoded += [(number, part.result()) for number, part in waiting]
    encode_s += time.perf_counter() - times[-1]
    snapshot.blocks.diff.forget()
    snapshot.pending = Pending((trainer.version, trainer.optimizer_steps), fingerprints)
    summary = Summary(
        tuple(fingerprints.tolist()),
        root_of(snapshot.fingerprints.tolist()),
        tuple(snapshot.grid.by_tensor(difference.counts).tolist()),
        int(difference.complete.sum()),
        *_slowest([diff_s, exchange_s, encode_s], device),
    )
    return encoded, summary


def acknowledge(snapshot: Snapshot, trainer: Trainer) -> None:
    """Every engine holds what was published last: that is the snapshot now. Of this rank alone."""
    pending = snapshot.pending
    assert pending is not None, "nothing was published"
    assert pending.taken_at == (trainer.version, trainer.optimizer_steps), "the weights were trained on before they were acknowledged"
    for held, bits in zip(snapshot.held, snapshot.live(_shards(trainer.model)), strict=True):
        held.copy_(bits)
    snapshot.fingerprints, snapshot.pending = pending.fingerprints, None


def _compare(snapshot: Snapshot, live: list[Tensor], codec: str, device: torch.device) -> Difference:
    """How much changed, over all ranks."""
    grid, blocks = snapshot.grid, snapshot.blocks
    counts = np.zeros(grid.blocks, np.int64)
    own = blocks.diff.count(live, snapshot.held)
    counts[blocks.number] = own
    counts = _sum_over_ranks(counts.view(np.uint64), device).view(np.int64)
    complete = grid.complete(counts) if codec != "dense" else np.ones(grid.blocks, bool)
    coded = snapshot.whole & ~complete if codec == "steps" else np.zeros(grid.blocks, bool)
    return Difference(counts, complete, coded, blocks.batches(own))


def _own_parts(
    snapshot: Snapshot, difference: Difference, codec: str, parts: tuple[range, ...], device: torch.device
) -> Iterator[tuple[int | None, list[Changes], dict[int, np.ndarray], float]]:
    """The parts that this rank encodes, a round after the other: number (None where a round has none for it), its changes that no rank has
    coded, the old tensors that the codec needs, seconds that this took."""
    spec, rank, world = snapshot.spec, dist.get_rank(), dist.get_world_size()
    listed = ~difference.coded & ((difference.counts > 0) | difference.complete)  # blocks
    changed = snapshot.grid.by_tensor(difference.counts)
    for first in range(0, len(parts), world):
        begun = time.perf_counter()
        those = parts[first : first + world]
        tensors = range(those[0].start, those[-1].stop)
        changes: list[Changes] = []
        old: dict[int, np.ndarray] = {}
        if listed[snapshot.grid.first[tensors.start] : snapshot.grid.first[tensors.stop]].any():
            changes = gather_changes(spec, those, _list(snapshot, difference, listed, tensors), device)
            if codec == "exponent":  # which codes a change by the old bits around it
                old = gather_tensors(spec, those, _list_old(snapshot, {t for t in tensors if changed[t]}), device)
        yield first + rank if rank < len(those) else None, changes, old, time.perf_counter() - begun


def _encode_part(
    spec: ModelSpec, tensors: range, found: list[wire.Blocks], changes: list[Changes], codec: str, old: dict[int, np.ndarray]
) -> bytes:
    return wire.lay_out(spec, tensors, [*found, wire.encode_blocks(spec, tensors, changes, codec, old.__getitem__)]).join()


def _list(snapshot: Snapshot, difference: Difference, listed: np.ndarray, tensors: range) -> dict[int, list[Changes]]:
    """This rank's shares of what is sent of these tensors. `listed`: bool [blocks], which are not coded and have something to send."""
    blocks = snapshot.blocks
    mine = np.flatnonzero(listed[blocks.number] & (blocks.tensor >= tensors.start) & (blocks.tensor < tensors.stop))
    return blocks.changes(mine, difference.complete[blocks.number[mine]])


def _list_old(snapshot: Snapshot, tensors: set[int]) -> dict[int, list[Stretches]]:
    """All that this rank's snapshot holds of these tensors."""
    found: dict[int, list[Stretches]] = {}
    for piece, held in zip(snapshot.pieces, snapshot.held, strict=True):
        for tensor in tensors & set(piece.tensors):
            found.setdefault(tensor, []).append(piece.stretches(tensor, _bits(held)))
    return found


def _full(pieces: list[Piece], live: list[Tensor], keys: np.ndarray, table: np.ndarray, device: torch.device) -> np.ndarray:
    """uint64 [tensors], what the pieces contribute to the fingerprints."""
    found = [np.zeros(0, fingerprint.RUN)]
    for piece, bits in zip(pieces, live, strict=True):
        runs, width = piece.runs, bits.element_size()
        size = min(width, 2)  # bytes of a word
        words = width // size  # of an element
        rows = np.zeros(len(runs.target), fingerprint.RUN)
        rows["address"] = bits.data_ptr() + (runs.target - piece.start) * width
        rows["start"], rows["words"] = runs.source * words, runs.length * words
        rows["key"], rows["out"], rows["size"] = keys[runs.tensor], runs.tensor, size
        found.append(rows)
    return Audit(np.concatenate(found), table, len(keys), device)()


def _shards(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.tensors()}


def _keep(bits: Tensor, on_host: bool) -> Tensor:
    """A copy that outlives the tensor."""
    return devices.on_host(bits) if on_host else bits.clone()


def _bits(integers: Tensor) -> np.ndarray:
    """Bits on the CPU, unsigned as in `Changes`."""
    return integers.cpu().numpy().view(f"<u{integers.element_size()}")


def _sum_over_ranks(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Of uint64, mod 2^64."""
    total = torch.from_numpy(values.view(np.int64)).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy().view(np.uint64)


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Of every time, the longest of any rank."""
    longest = torch.tensor(seconds, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()
