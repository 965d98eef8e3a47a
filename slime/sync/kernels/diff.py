"""What differs between live weights and a snapshot of them: counted by block, then listed. Any number of tensors and blocks in one launch.

A block's elements lie in one or more stretches that are contiguous in both memories. They are cut into spans, a program each on CUDA:

    old, live  addresses of its first element
    first      position of that in the block
    count      elements, at most SPAN; a multiple of TAIL, or fewer than that: the rest of a stretch has a span of its own
    at         where its entries go, see native.c; on CUDA its first word of the masks, a bit an element, that counting leaves

The spans of a block follow one another by `first`, so that its entries ascend. There are two passes: the number of entries is known before
there is room for them, and what was counted and is not needed is not listed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from slime.sync import kernels, native
from slime.sync.bits import INTEGERS
from slime.sync.kernels.audit import VECTOR_BYTES, on, upload

SPAN, TAIL = 1 << 15, 16
STEP = 4096  # elements that a program reads at a time
WARPS = 4
WORD = 32  # elements of a word of a mask
FIELDS = 5  # int64 fields of a span's record


@dataclass(frozen=True, slots=True)
class Stretches:
    """Which elements are compared, ordered by (block, first). Each number of a block up to `blocks` comes at least once."""

    memory: np.ndarray  # int64 [n], number of the pair of memories that it lies in
    offset: np.ndarray  # int64 [n], of its first element from the start of the memory, in elements
    block: np.ndarray  # int64 [n], ascending
    first: np.ndarray  # int64 [n], position of its first element in the block
    count: np.ndarray  # int64 [n], elements

    def cut(self) -> "Stretches":
        """None longer than SPAN, none but the shortest of other lengths than multiples of TAIL."""
        even = self.count // TAIL * TAIL
        full = -(-even // SPAN)
        spans = full + (even < self.count)
        of, nth = np.repeat(np.arange(len(spans)), spans), ranges(np.zeros_like(spans), spans)
        low = np.minimum(nth * SPAN, even[of])
        high = np.where(nth < full[of], np.minimum(low + SPAN, even[of]), self.count[of])
        return Stretches(self.memory[of], self.offset[of] + low, self.block[of], self.first[of] + low, high - low)


@dataclass(frozen=True)
class Listed:
    """Entries of some blocks of one width, on the device, one block after the other."""

    blocks: np.ndarray  # int64 [k], ascending
    starts: np.ndarray  # int64 [k + 1], first entry of each; then the number of entries
    positions: torch.Tensor  # int32 [n], in the block, ascending
    old: torch.Tensor  # bits [n]
    new: torch.Tensor  # bits [n]

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [k]"""
        return np.diff(self.starts)

    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, old and new bits, unsigned."""
        unsigned = f"<u{self.old.element_size()}"
        return self.positions.cpu().numpy(), self.old.cpu().numpy().view(unsigned), self.new.cpu().numpy().view(unsigned)


class Diff:
    """Compares memories `live[m]` and `held[m]`, contiguous tensors of one integer type (INTEGERS) each, as `stretches` say.

    A block's elements are of one width, `widths` [memories] in bytes says of which; blocks of one width have consecutive numbers. `live`
    lies on `device`, `held` there or in page-locked memory. Work is queued on the device's current stream.
    """

    def __init__(self, stretches: Stretches, widths: np.ndarray, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.on_triton = kernels.on_triton(self.device)
        self.blocks = int(stretches.block[-1]) + 1 if len(stretches.block) else 0
        self._spans = stretches.cut()
        assert (np.diff(self._spans.block) >= 0).all()
        self._widths = widths[self._spans.memory]
        self._kinds = np.unique(self._widths).tolist()
        self._first = np.searchsorted(self._spans.block, np.arange(self.blocks + 1))  # span of each block
        self._bases = np.zeros((0, 0), np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._masks: torch.Tensor | None = None

    def count(self, live: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> np.ndarray:
        """int64 [blocks]: how many elements of each differ. Waits for the device. `entries` reads the same memories, which must stay and
        not change until `forget`."""
        bases = np.array([[tensor.data_ptr() for tensor in side] for side in (held, live)], np.uint64).reshape(2, -1)
        if not np.array_equal(bases, self._bases):
            self._locate(bases)
        if self.on_triton:
            self._counts = self._count_on_triton()
        else:
            self._counts = np.zeros(len(self._widths), np.int64)
            for width in self._kinds:
                mine = self._widths == width
                self._counts[mine] = native.spans_count(self._records[mine], width)
        return np.add.reduceat(self._counts, self._first[:-1]) if self.blocks else np.zeros(0, np.int64)

    def entries(self, blocks: np.ndarray, everything: bool = False) -> Listed:
        """What differs in these blocks (int64 [k], ascending, of one width), or all their elements. As `count` saw it last."""
        numbers = ranges(self._first[blocks], self._first[blocks + 1])
        counts = self._spans.count[numbers] if everything else self._counts[numbers]
        ends = np.append(0, np.cumsum(counts))
        begins = ends[:-1]
        starts = ends[np.append(0, np.cumsum(self._first[blocks + 1] - self._first[blocks]))]
        width = int(self._widths[numbers[0]]) if len(numbers) else 1
        dtype, n = INTEGERS[width], int(ends[-1])
        positions = torch.empty(n, dtype=torch.int32, device=self.device)
        old, new = (torch.empty(n, dtype=dtype, device=self.device) for _ in range(2))
        some = counts > 0
        numbers, begins = numbers[some], begins[some]
        if self.on_triton:
            self._list_on_triton(numbers, begins, width, everything, positions, old, new)
        else:
            spans = self._records[numbers]
            spans["at"] = begins
            native.spans_list(spans, everything, positions.numpy(), old.numpy(), new.numpy())
        return Listed(blocks, starts, positions, old, new)

    def forget(self) -> None:
        """Give back what was kept for `entries`: on CUDA a bit an element."""
        self._masks = None

    def _locate(self, bases: np.ndarray) -> None:
        """Addresses of all spans; the same from publication to publication unless memory was given back meanwhile."""
        self._bases, spans = bases, self._spans
        self._records = np.zeros(len(spans.count), native.SPAN)
        for name, base in zip(("old", "live"), bases, strict=True):
            self._records[name] = base[spans.memory] + (spans.offset * self._widths).astype(np.uint64)
        self._records["first"], self._records["count"] = spans.first, spans.count
        either = self._records["old"] | self._records["live"]
        self._wide = (either % VECTOR_BYTES == 0) & (spans.count % TAIL == 0)
        if self.on_triton:
            words = -(-spans.count // WORD)
            self._words, self._records["at"] = int(words.sum()), np.cumsum(words) - words
            self._there = upload(self._records.view(np.int64).reshape(-1, FIELDS), self.device)
            self._order = list(self._alike())

    def _alike(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Spans that one launch can count, and its constants."""
        from slime.sync.kernels import diff_programs

        for width in self._kinds:
            for wide in (True, False):
                mine = np.flatnonzero((self._widths == width) & (self._wide == wide))
                constants = {"FIELDS": FIELDS, "STEP": STEP, "TYPE": diff_programs.TYPES[width], "WIDE": wide, "num_warps": WARPS}
                if len(mine):
                    yield upload(mine.astype(np.int32), self.device), constants

    def _count_on_triton(self) -> np.ndarray:
        from slime.sync.kernels import diff_programs

        counts = torch.empty(len(self._widths), dtype=torch.int32, device=self.device)
        self._masks = torch.empty(self._words, dtype=torch.int32, device=self.device)
        with on(self.device):
            for order, constants in self._order:
                diff_programs.count_changes[(len(order),)](self._there, order, self._masks, counts, **constants)
        return counts.cpu().numpy().astype(np.int64)

    def _list_on_triton(self, numbers: np.ndarray, begins: np.ndarray, width: int, everything: bool, *out: torch.Tensor) -> None:
        from slime.sync.kernels import diff_programs

        assert self._masks is not None, "count comes first"
        if not len(numbers):
            return
        order, begin = upload(numbers.astype(np.int32), self.device), upload(begins, self.device)
        constants = {"FIELDS": FIELDS, "WORDS": SPAN // WORD, "TYPE": diff_programs.TYPES[width], "num_warps": WARPS}
        with on(self.device):
            arguments = (self._there, order, begin, int(everything), self._masks, *out)
            diff_programs.list_changes[(len(order),)](*arguments, **constants)


def ranges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """int64: low[0] ... high[0] - 1, then low[1] ... high[1] - 1, and so on."""
    lengths = high - low
    return np.repeat(low - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
