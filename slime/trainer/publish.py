"""The trainer's end of the weight channel on one rank: a snapshot of what every engine holds, and what has changed since.

    take_base     keeps the bits of this rank's slice of the model and computes every tensor's fingerprint, once
    encode        compares, counts what changed over all ranks, exchanges it so that one rank has all changes of a part, encodes that
    acknowledge   makes the published weights the snapshot

What was published and not acknowledged is forgotten: the next publication is a difference to the same snapshot.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.sync import fingerprint, native, wire
from slime.sync.diff import Grid, Summary
from slime.sync.manifest import root_of
from slime.sync.records import Changes, ModelSpec
from slime.trainer.distributed import Parallel
from slime.trainer.model import Model
from slime.trainer.publish_exchange import gather_changes, gather_tensors
from slime.trainer.publish_slices import PIECE, Piece, Stretches, model_spec, own_pieces
from slime.trainer.state import Trainer

KEPT = 16  # changes of a piece are kept from counting to sending where they are at most 1 in this many; else they are found again


@dataclass(frozen=True, slots=True)
class Pending:
    """What was published and waits for its acknowledgement."""

    taken_at: tuple[int, int]  # version and optimizer steps of the trainer
    fingerprints: np.ndarray  # uint64 [tensors]


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed since the snapshot. `kept` is this rank's, everything else is over all ranks."""

    changed: np.ndarray  # int64 [tensors], elements
    complete: np.ndarray  # bool [blocks], whether a block is listed whole
    fingerprints: np.ndarray  # uint64 [tensors], of the new version
    kept: list[list[Changes] | None]  # changes of each piece; None where they are many


@dataclass(slots=True)
class Snapshot:
    """The last version that every engine holds: this rank's slice of it, 1/DP of the bytes of its shard."""

    spec: ModelSpec
    grid: Grid
    pieces: list[Piece]
    held: list[Tensor]  # bits of each piece, as integers
    keys: list[int]  # of the tensors' fingerprints
    table: np.ndarray  # of fingerprints
    fingerprints: np.ndarray  # uint64 [tensors], of the whole tensors
    pending: Pending | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held)

    def differences(self, number: int, shards: dict[str, Tensor], complete: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a piece: positions from its start (int64 [n], ascending) of what changed or lies in a complete block, old bits, new bits."""
        piece = self.pieces[number]
        new = piece.bits_of(shards)
        old = self.held[number].to(new.device, non_blocking=True)
        whole = complete[piece.runs.block]
        if whole.all():
            return np.arange(len(piece)), _bits(old), _bits(new)
        if new.device.type == "cpu" and not whole.any():
            before, after = _bits(old), _bits(new)
            at = native.diff(before, after)
            return at, before[at], after[at]
        listed = new != old
        if whole.any():
            listed |= torch.from_numpy(np.repeat(whole, piece.runs.length)).to(new.device)
        found = listed.nonzero().squeeze(1)
        return found.cpu().numpy(), _bits(old[found]), _bits(new[found])


def take_base(model: Model, parallel: Parallel, run_id: str, on_host: bool = False, piece_size: int = PIECE) -> Snapshot:
    """The weights as they are, as snapshot: on the model's device, or in (on CUDA pinned) host memory. All ranks call it together."""
    spec = model_spec(model)
    signatures: list[str] = [""] * parallel.world
    dist.all_gather_object(signatures, spec.signature)
    assert len(set(signatures)) == 1, f"ranks see different models: {signatures}"
    key = fingerprint.run_key(run_id)
    keys, table = [fingerprint.tensor_key(key, tensor.name) for tensor in spec.tensors], fingerprint.table(key)
    pieces, shards = own_pieces(model, parallel, spec, piece_size), _shards(model)
    held = [_keep(piece.bits_of(shards), on_host) for piece in pieces]
    sums, owned = np.zeros((2, len(spec.tensors)), np.uint64)
    for piece, bits in zip(pieces, held, strict=True):
        sums += _full(piece, _bits(bits), keys, table)
        np.add.at(owned, piece.runs.tensor, piece.runs.length.astype(np.uint64))
    sums, owned = _sum_over_ranks(np.stack([sums, owned]), model.device)
    wrong = [tensor.name for tensor, n in zip(spec.tensors, owned.tolist(), strict=True) if tensor.size != n]
    assert not wrong, f"not every element has one rank that publishes it: {wrong}"
    return Snapshot(spec, Grid.of(spec), pieces, held, keys, table, sums)


def encode(snapshot: Snapshot, trainer: Trainer, codec: str, part_bytes: int, threads: int = 1) -> tuple[list[tuple[int, bytes]], Summary]:
    """The difference between the trainer's weights and the snapshot: (number, bytes) of the parts that this rank encodes, ascending, and
    the summary, which all ranks get. With codec "dense" all elements are listed, whether they changed or not. `threads` parts are encoded
    at a time. All ranks call it together."""
    device, shards = trainer.model.device, _shards(trainer.model)
    begun = time.perf_counter()
    difference = _compare(snapshot, shards, codec, device)
    diff_s = time.perf_counter() - begun
    encoded, exchange_s, parts = [], 0.0, snapshot.spec.parts(part_bytes)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[tuple[int, bytes, float]]] = deque()
        for number, changes, old, seconds in _own_parts(snapshot, difference, shards, codec, parts, device):
            exchange_s += seconds
            if number is not None:
                waiting.append(pool.submit(_encode_part, snapshot.spec, parts[number], number, changes, codec, old))
            while len(waiting) > threads:
                encoded.append(waiting.popleft().result())
        encoded += [part.result() for part in waiting]
    encode_s = sum(seconds for _, _, seconds in encoded)
    snapshot.pending = Pending((trainer.version, trainer.optimizer_steps), difference.fingerprints)
    summary = Summary(
        tuple(difference.fingerprints.tolist()),
        root_of(snapshot.fingerprints.tolist()),
        tuple(difference.changed.tolist()),
        int(difference.complete.sum()),
        *_slowest([diff_s, exchange_s, encode_s], device),
    )
    return [(number, payload) for number, payload, _ in encoded], summary


def acknowledge(snapshot: Snapshot, trainer: Trainer) -> None:
    """Every engine holds what was published last: that is the snapshot now. Of this rank alone."""
    pending = snapshot.pending
    assert pending is not None, "nothing was published"
    assert pending.taken_at == (trainer.version, trainer.optimizer_steps), "the weights were trained on before they were acknowledged"
    shards = _shards(trainer.model)
    for piece, held in zip(snapshot.pieces, snapshot.held, strict=True):
        held.copy_(piece.bits_of(shards))
    snapshot.fingerprints, snapshot.pending = pending.fingerprints, None


def _compare(snapshot: Snapshot, shards: dict[str, Tensor], codec: str, device: torch.device) -> Difference:
    """What changed, over all ranks."""
    grid, keys, table = snapshot.grid, snapshot.keys, snapshot.table
    none = np.zeros(grid.blocks, bool)
    counts = np.zeros(grid.blocks, np.int64)
    sums = [0] * len(keys)
    kept: list[list[Changes] | None] = []
    for number, piece in enumerate(snapshot.pieces):
        at, old, new = snapshot.differences(number, shards, none)
        np.add.at(counts, piece.runs.block, piece.count(at))
        changes = list(piece.changes(at, old, new))
        for c in changes:
            after, before = (fingerprint.at(c.positions, bits, keys[c.tensor], table) for bits in (c.new, c.old))
            sums[c.tensor] = (sums[c.tensor] + after - before) % (1 << 64)
        kept.append(changes if len(at) * KEPT <= len(piece) else None)
    total = _sum_over_ranks(np.concatenate([counts.view(np.uint64), np.array(sums, np.uint64)]), device)
    counts = total[: grid.blocks].view(np.int64)
    complete = grid.complete(counts) if codec != "dense" else np.ones(grid.blocks, bool)
    return Difference(grid.by_tensor(counts), complete, snapshot.fingerprints + total[grid.blocks :], kept)


def _own_parts(
    snapshot: Snapshot, difference: Difference, shards: dict[str, Tensor], codec: str, parts: tuple[range, ...], device: torch.device
) -> Iterator[tuple[int | None, list[Changes], dict[int, np.ndarray], float]]:
    """The parts that this rank encodes, a round after the other: number (None where a round has none for it), its changes, the old tensors
    that the codec needs, seconds that this took."""
    spec, rank, world = snapshot.spec, dist.get_rank(), dist.get_world_size()
    ends = np.array([(piece.tensors[0], piece.tensors[-1]) for piece in snapshot.pieces], np.int64).reshape(-1, 2)
    for first in range(0, len(parts), world):
        begun = time.perf_counter()
        those = parts[first : first + world]
        tensors = range(those[0].start, those[-1].stop)
        near = np.flatnonzero((ends[:, 1] >= tensors.start) & (ends[:, 0] < tensors.stop)).tolist()  # pieces
        changes = gather_changes(spec, those, _list(snapshot, difference, shards, tensors, near), device)
        old: dict[int, np.ndarray] = {}
        if codec == "exponent":  # which codes a change by the old bits around it
            old = gather_tensors(spec, those, _list_old(snapshot, {t for t in tensors if difference.changed[t]}, near), device)
        yield first + rank if rank < len(those) else None, changes, old, time.perf_counter() - begun


def _encode_part(
    spec: ModelSpec, tensors: range, number: int, changes: list[Changes], codec: str, old: dict[int, np.ndarray]
) -> tuple[int, bytes, float]:
    """(number, bytes, seconds) of a part."""
    begun = time.perf_counter()
    payload = wire.encode_part(spec, tensors, changes, codec, old.__getitem__)
    return number, payload, time.perf_counter() - begun


def _list(
    snapshot: Snapshot, difference: Difference, shards: dict[str, Tensor], tensors: range, near: list[int]
) -> dict[int, list[Changes]]:
    """This rank's shares of what is sent of these tensors. `near`: pieces that may hold some of them."""
    shares: dict[int, list[Changes]] = {}
    for number in near:
        piece = snapshot.pieces[number]
        found: Iterable[Changes] | None = difference.kept[number]
        if found is None or difference.complete[piece.runs.block].any():
            found = piece.changes(*snapshot.differences(number, shards, difference.complete))
        for changes in found:
            if changes.tensor in tensors:
                shares.setdefault(changes.tensor, []).append(changes)
    return shares


def _list_old(snapshot: Snapshot, tensors: set[int], near: list[int]) -> dict[int, list[Stretches]]:
    """All that this rank's snapshot holds of these tensors; `near` as in `_list`."""
    found: dict[int, list[Stretches]] = {}
    for piece, held in ((snapshot.pieces[number], snapshot.held[number]) for number in near):
        for tensor in tensors & set(piece.tensors):
            found.setdefault(tensor, []).append(piece.stretches(tensor, _bits(held)))
    return found


def _full(piece: Piece, bits: np.ndarray, keys: list[int], table: np.ndarray) -> np.ndarray:
    """uint64 [tensors], what a piece contributes to the fingerprints."""
    runs, width = piece.runs, bits.itemsize
    size = min(width, 2)  # bytes of a word
    words = width // size  # of an element
    found = np.zeros(len(runs.target), fingerprint.RUN)
    found["address"] = bits.ctypes.data + (runs.target - piece.start) * width
    found["start"], found["words"] = runs.source * words, runs.length * words
    found["key"] = np.array(keys, np.uint64)[runs.tensor]
    found["out"], found["size"] = runs.tensor, size
    return fingerprint.over_runs(found, table, len(keys))


def _shards(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.tensors()}


def _keep(bits: Tensor, on_host: bool) -> Tensor:
    """A copy that outlives the tensor."""
    if not on_host:
        return bits.clone()
    return torch.empty_like(bits, device="cpu", pin_memory=bits.is_cuda).copy_(bits)


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
