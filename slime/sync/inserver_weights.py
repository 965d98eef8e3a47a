"""The live weights of one model in one rank: learned, staged, overwritten, undone, proven.

    held      label of the weights, None while they may be anything
    staged    what is ready to be written, with what it will replace
    undo      the same after it was written

A label is held only from the end of a commit that ran through to the beginning of the next write. Methods raise ValueError where they
refuse; the weights are then as they were.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slime.sync import fingerprint, staging
from slime.sync.bits import INTEGERS
from slime.sync.inserver_learn import learn
from slime.sync.inserver_lives import LiveTensors
from slime.sync.kernels import side_stream, wait
from slime.sync.kernels.audit import Audit
from slime.sync.kernels.scatter import Scatter
from slime.sync.livemap import Live
from slime.sync.records import ModelSpec

Tensors = Iterable[tuple[str, torch.Tensor]]  # HF names and tensors
CHUNK = 32 << 20  # bytes copied to the device at a time, through pinned memory


class Refused(ValueError):
    """A command that does not fit what is held or staged. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A version that can be written and undone."""

    version: str
    parent: str
    new: tuple[Scatter, ...]
    old: tuple[Scatter, ...]
    lives: frozenset[int]
    entries: int


class Weights:
    """A model's. `taken` are addresses of storages that belong to a model that was learned before."""

    def __init__(self, model: Any, spec: ModelSpec, run_id: str, held: str | None = None, taken: frozenset[int] = frozenset()) -> None:
        """Learns the map. Raises CannotLearn, and RuntimeError where learning changed a weight."""
        self.model = model
        self.spec = spec
        self.held = held
        self.staged: Ready | None = None
        self.undo: Ready | None = None
        self.lives = LiveTensors(model, taken)
        self.device = self.lives.device
        self._key = fingerprint.run_key(run_id)
        self._table = fingerprint.table(self._key)
        with self._whole() as whole:
            before = whole()
            self.map, self._loaded = learn(model, spec, self.lives)
            if (changed := np.flatnonzero(before != whole())).size:
                raise RuntimeError(f"watching load_weights changed {', '.join(self.lives.name(int(live)) for live in changed)}")
        self._used = frozenset({move.live for move in self.map.moves} | set(self.map.foreign))
        self._feeding = frozenset(live for of in self.map.derived.values() for live in of)
        self._foreign = tuple(self.map.foreign)
        self._audit = Audit(self._runs(), self._table, len(self.map.moves) + len(self._foreign), self.device)
        self._stream = side_stream(self.device)
        if self._stream is not None:
            self._compile()
        self._baseline = self._audit()[len(self.map.moves) :]

    @property
    def on_device(self) -> bool:
        """Whether a version is staged in the memory of a device, beside its weights."""
        return self._stream is not None

    def _compile(self) -> None:
        """Do once, while the engine is paused, what is slow the first time: pin memory, and compile what moves entries of every width."""
        pinned = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        del pinned  # torch keeps it for the next who asks
        for width in {self.lives.lives[live].width for live in self._used}:
            memory, bits = (torch.zeros(1, dtype=INTEGERS[width], device=self.device) for _ in range(2))
            segment = np.zeros(1, staging.SEGMENT)
            segment["address"], segment["count"], segment["width"] = memory.data_ptr(), 1, width
            scatter = Scatter(segment, torch.zeros(1, dtype=torch.int32, device=self.device), bits, self.device)
            scatter.write()
            scatter.read()

    @property
    def addresses(self) -> frozenset[int]:
        """Where the storages of this map begin."""
        found = self.lives.addresses
        return frozenset(int(found[live]) for live in self._used)

    # --- staging: on the daemon thread, while the engine generates ---------------------------------------------------

    def stage(self, path: str, version: str, parent: str) -> int:
        """Make `version` ready, from the staged file at `path`; the file may go afterwards. Returns its entries.

        Raises Refused where another version is held than `parent`, or the live bits are not the base's; StageError for the file.
        """
        if self.held == version:
            return 0
        if self.held is not None and self.held != parent:
            raise Refused(f"{version} begins from {parent}, but {self.held} is held")
        self.staged = self.undo = None  # and with them their memory
        self.lives.check(self._used)
        staged = staging.read(path, self.map, self._key)
        if (staged.version, staged.parent) != (version, parent):
            raise Refused(f"{path} holds {staged.version} from {staged.parent}, not {version} from {parent}")
        with self._aside():
            new, old = [], []
            for part in staged.widths:
                segments = part.segments(self.lives.addresses)
                index, bits = self._upload(part.index, 4), self._upload(part.bits, part.width)
                scatter = Scatter(segments, index, bits, self.device)
                gathered = scatter.read()
                if self._fingerprint(gathered, part.width) != part.base:
                    raise Refused(f"the live weights are not {parent}: what {version} would replace has other bits")
                new.append(scatter)
                old.append(Scatter(segments, index, gathered, self.device))
        self.staged = Ready(version, parent, tuple(new), tuple(old), staged.lives, staged.entries)
        return staged.entries

    def drop(self, version: str | None = None) -> None:
        """Let go what is staged and the undo log, of `version` or of any."""
        if self.staged is not None and version in (None, self.staged.version):
            self.staged = None
        if self.undo is not None and version in (None, self.undo.version):
            self.undo = None

    # --- writing: in the scheduler's own thread, while the engine is paused -------------------------------------------

    def commit(self, version: str, parent: str, opaque: Tensors | None = None) -> dict[str, float]:
        """Write what is staged, and load `opaque` HF tensors; of the version that is held already, do nothing. Returns seconds.

        A failure on the way is undone. Where it came while `opaque` was loaded, nothing is held until `revert` has loaded the old ones.
        """
        if self.held == version:
            return {}
        ready = self.staged
        if ready is None or (ready.version, ready.parent) != (version, parent):
            raise Refused(f"{version} from {parent} is not staged; {f'{ready.version} from {ready.parent}' if ready else 'nothing'} is")
        if self.held is not None and self.held != parent:
            raise Refused(f"{version} begins from {parent}, but {self.held} is held")
        self.lives.check(self._used)
        self.staged, self.undo, self.held = None, ready, None
        try:
            seconds = self._put(ready.new, ready.lives, opaque)
        except BaseException:
            self._put(ready.old, ready.lives, None)
            self.held = parent if opaque is None else None
            raise
        self.held = version
        return seconds

    def revert(self, version: str, opaque: Tensors | None = None) -> dict[str, float]:
        """Undo a commit of `version`, and load the `opaque` HF tensors of its parent; where it is not held and was not begun, do nothing.
        Returns seconds."""
        ready = self.undo
        if ready is None or ready.version != version:
            if self.held == version:
                raise Refused(f"{version} cannot be undone: what it replaced was dropped")
            return {}  # it was not begun; the audit says what is held
        if self.held == ready.parent:
            return {}
        self.lives.check(self._used)
        self.held = None
        seconds = self._put(ready.old, ready.lives, opaque)
        self.held = ready.parent
        return seconds

    def load(self, tensors: Tensors, version: str | None) -> None:
        """model.load_weights of HF tensors. Nothing is held or staged from here on; `version`, if given, is held when it ends."""
        self.held = self.staged = self.undo = None
        self._load(tensors)
        self.held = version

    def adopt(self, version: str) -> None:
        """Something else has loaded the weights, and its caller says that they are `version`; the audit says whether that is so."""
        self.lives.check(self._used)
        self.staged = self.undo = None
        self._rebase(self._loaded)
        self.held = version

    def _load(self, tensors: Tensors) -> None:
        with torch.no_grad():
            self.model.load_weights(self._known(tensors))
        self.lives.check(self._used)
        self._rebase(self._loaded)

    def _known(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            number = self.spec.index.get(name)
            if number is None or tuple(tensor.shape) != self.spec.tensors[number].shape:
                raise Refused(f"{name} {tuple(tensor.shape)} is no tensor of the model")
            if str(tensor.dtype) != f"torch.{self.spec.tensors[number].dtype}":
                raise Refused(f"{name} has dtype {tensor.dtype}, not {self.spec.tensors[number].dtype}")
            yield name, tensor

    def _put(self, scatters: Iterable[Scatter], lives: frozenset[int], opaque: Tensors | None) -> dict[str, float]:
        """Write, load, and bring what the model derives from it up to date."""
        clock = Clock(self.device)
        for scatter in scatters:
            scatter.write()
        clock.lap("write_s")
        if lives & self._feeding:
            with torch.no_grad():
                self.model.post_load_weights()
            self.lives.check(self._used)
            self._rebase(self.map.derived)
            clock.lap("derive_s")
        if opaque is not None:
            self._load(opaque)
            clock.lap("load_s")
        return clock.seconds

    # --- proof ----------------------------------------------------------------------------------------------------

    def audit(self) -> tuple[np.ndarray, list[str]]:
        """uint64 [moves]: the fingerprint of every move's live bits; and the names of storages in which something without a source has
        changed."""
        self.lives.check(self._used)
        found = self._audit()
        moves = len(self.map.moves)
        return found[:moves], [self.lives.name(self._foreign[int(i)]) for i in np.flatnonzero(found[moves:] != self._baseline)]

    def _rebase(self, lives: Iterable[int]) -> None:
        chosen = np.isin(np.array(self._foreign, np.int64), np.array(sorted(lives), np.int64))
        if chosen.any():
            self._baseline = np.where(chosen, self._audit()[len(self.map.moves) :], self._baseline)

    def _runs(self) -> np.ndarray:
        """What to hash: the moves, each its own sum, then the foreign elements of every storage that has some."""
        addresses = self.lives.addresses
        found = [np.zeros(0, fingerprint.RUN)]
        for out, move in enumerate(self.map.moves):
            source, target = move.stretches()
            key = fingerprint.tensor_key(self._key, self.spec.tensors[move.tensor].name)
            found.append(_runs(self.lives.lives[move.live], int(addresses[move.live]), target, source, move.stretch, key, out))
        for out, (live, runs) in enumerate(self.map.foreign.items(), len(self.map.moves)):
            start, end = np.array(runs, np.int64).T
            key = fingerprint.tensor_key(self._key, f"live:{self.lives.name(live)}")
            found.append(_runs(self.lives.lives[live], int(addresses[live]), start, start, end - start, key, out))
        return np.concatenate(found)

    @contextmanager
    def _whole(self) -> Iterator[Callable[[], np.ndarray]]:
        """The fingerprint of every storage by its name."""
        found = [np.zeros(0, fingerprint.RUN)]
        for out, (live, address) in enumerate(zip(self.lives.lives, self.lives.addresses.tolist(), strict=True)):
            start = np.zeros(1, np.int64)
            found.append(_runs(live, address, start, start, live.size, fingerprint.tensor_key(self._key, live.name), out))
        yield Audit(np.concatenate(found), self._table, len(self.lives.lives), self.device)

    def _fingerprint(self, bits: torch.Tensor, width: int) -> int:
        start, live = np.zeros(1, np.int64), Live(staging.BASE, _DTYPE[width], len(bits))
        runs = _runs(live, bits.data_ptr(), start, start, len(bits), fingerprint.tensor_key(self._key, staging.BASE), 0)
        return int(Audit(runs, self._table, 1, self.device)()[0])

    # --- the device -----------------------------------------------------------------------------------------------

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work on a stream of its own, and wait for it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def _upload(self, array: np.ndarray, width: int) -> torch.Tensor:
        """A tensor of the bits on the device, by way of pinned memory in two halves."""
        flat = array.view(np.dtype(f"<i{width}") if width > 1 else np.uint8)
        if self._stream is None:
            return torch.from_numpy(np.array(flat))
        made = torch.empty(len(flat), dtype=INTEGERS[width], device=self.device)
        step = CHUNK // width
        pinned = [torch.empty(min(step, len(flat)), dtype=INTEGERS[width], pin_memory=True) for _ in range(2)]
        done = [torch.cuda.Event(), torch.cuda.Event()]
        for i, first in enumerate(range(0, len(flat), step)):
            half, piece = pinned[i % 2], flat[first : first + step]
            done[i % 2].synchronize()
            np.copyto(half.numpy()[: len(piece)], piece)
            made[first : first + step].copy_(half[: len(piece)], non_blocking=True)
            done[i % 2].record()
        self._stream.synchronize()  # before the pinned memory goes
        return made


class Clock:
    """Seconds of work on a device, lap by lap. It begins when all that was queued there is done."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        wait(device)
        self._from = time.perf_counter()

    def lap(self, name: str) -> None:
        wait(self._device)
        now = time.perf_counter()
        self.seconds[name] = now - self._from
        self._from = now


_DTYPE = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def _runs(live: Live, address: int, target: np.ndarray, source: np.ndarray, length: int | np.ndarray, key: int, out: int) -> np.ndarray:
    """fingerprint.RUN [n]: `length` elements from position `target` of a storage on, hashed as elements `source` on (int64 [n] each)."""
    words = max(1, live.width // 2)  # of an element
    found = np.zeros(len(target), fingerprint.RUN)
    found["address"] = target.astype(np.uint64) * np.uint64(live.width) + np.uint64(address)
    found["start"], found["words"] = source * words, length * words
    found["key"], found["out"], found["size"] = key, out, min(live.width, 2)
    return found
