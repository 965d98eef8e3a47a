"""What engines hold of the weights that travel: the same tensors, or, of FP8 engines, codes and scales made from them.

    Served     `trainer`: HF tensors as they travel, what deltas are decoded against
               `engine`: HF tensors as engines load them, what they are proven to hold; here the same
    Quantised  `engine` holds codes and scales (see slime/sync/fp8.py) and shares the memory of what is not quantised

A change of the trainer's tensors is carried over to the engines' without touching either; `apply` then changes both.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from slime.engine.host_copy import HostCopy, Part, bits_of, tensor_of
from slime.sync import fp8
from slime.sync.bursts import in_order
from slime.sync.protocol import Bucket
from slime.sync.records import Changes


class Served:
    """See the module. Engines hold what travels."""

    def __init__(self, trainer: HostCopy, engine: HostCopy | None = None) -> None:
        self.trainer = trainer
        self.engine = trainer if engine is None else engine

    @property
    def converts(self) -> bool:
        """Whether engines hold something else than what travels."""
        return self.engine is not self.trainer

    def ahead(self, changes: Changes, after: int) -> Iterable[tuple[Changes, int]]:
        """What the changes of a trainer's tensor, which then has the fingerprint `after`, change in the engines' tensors, each with the
        fingerprint that it will have; nothing is changed."""
        return [(changes, after)]

    def bucket(self, bucket: Bucket) -> Bucket:
        """Whole tensors of the trainer as engines load them."""
        return bucket

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """All tensors as engines load them, of the version that is held."""
        return self.engine.buckets(bucket_bytes)

    def apply(self, parts: Iterable[Part], label: str, trainer: Sequence[int], engine: Sequence[int]) -> None:
        """Become the version that the trainer's changes lead to, with these fingerprints of both."""
        self.trainer.apply(parts, label, trainer)

    def replace(
        self, buckets: Sequence[Bucket], loaded: Sequence[Bucket], label: str, trainer: Sequence[int], engine: Sequence[int]
    ) -> None:
        """Become the version that consists of these tensors of the trainer's, `loaded` by engines as `bucket` made them, with these
        fingerprints of both."""
        self.trainer.replace(buckets, label, trainer)


class Quantised(Served):
    """Engines hold matrices as codes and scales."""

    def __init__(self, trainer: HostCopy, run_id: str) -> None:
        """Raises ValueError for a matrix that is not bfloat16."""
        spec = fp8.served(trainer.spec)
        self._blocks = {i: fp8.Blocks.of(t.shape) for i, t in enumerate(trainer.spec.tensors) if fp8.is_quantised(t)}
        self._peaks: dict[int, np.ndarray] = {}
        self._number = [spec.index[tensor.name] for tensor in trainer.spec.tensors]  # of the codes, or of the tensor; scales come next
        made = in_order(lambda tensor: fp8.quantise(trainer.bits(tensor), self._blocks[tensor]), self._blocks)
        quantised = dict(zip(self._blocks, made, strict=True))
        held: list[np.ndarray] = []
        for tensor in range(len(trainer.spec.tensors)):
            if tensor in self._blocks:
                codes, scales, self._peaks[tensor] = quantised[tensor]
                held += [codes, scales.view("<u4")]
            else:
                held.append(trainer.bits(tensor))
        super().__init__(trainer, HostCopy(spec, run_id, trainer.label, held))

    def ahead(self, changes: Changes, after: int) -> Iterable[tuple[Changes, int]]:
        return self.engine.ahead(self._followed(changes)[0])

    def _followed(self, changes: Changes) -> tuple[list[Changes], np.ndarray | None]:
        """The engines' changes, and the peaks of a quantised tensor."""
        number = self._number[changes.tensor]
        if changes.tensor not in self._blocks:
            return [Changes(number, changes.positions, changes.old, changes.new)], None
        before, held = self._peaks[changes.tensor], self.engine.bits(number)
        matrix = fp8.Matrix(self._blocks[changes.tensor], self.trainer.bits(changes.tensor), held, before)
        positions, codes, peaks = matrix.after(changes.positions, changes.old, changes.new)
        moved = np.flatnonzero(peaks != before)
        scales = fp8.scales(peaks[moved]).view("<u4")
        return [
            Changes(number, positions, held[positions], codes),
            Changes(number + 1, moved, self.engine.bits(number + 1)[moved], scales),
        ], peaks

    def bucket(self, bucket: Bucket) -> Bucket:
        found: Bucket = []
        for name, tensor in bucket:
            number = self.trainer.spec.index[name]
            if number not in self._blocks:
                found.append((name, tensor))
                continue
            codes, scales, _ = fp8.quantise(bits_of(tensor), self._blocks[number])
            spec, place = self.engine.spec, self._number[number]
            found.append((name, tensor_of(spec, place, codes)))
            found.append((spec.tensors[place + 1].name, tensor_of(spec, place + 1, scales.view("<u4"))))
        return found

    def apply(self, parts: Iterable[Part], label: str, trainer: Sequence[int], engine: Sequence[int]) -> None:
        super().apply((partial(self._followed_by_engine, part) for part in parts), label, trainer, engine)
        self.engine.apply((), label, engine)

    def _followed_by_engine(self, part: Part) -> Iterator[Changes]:
        """The trainer's changes; the engines' are made before each of them."""
        for changes in part():
            carried, peaks = self._followed(changes)  # of the trainer's old bits, so before they go
            if peaks is not None:
                self._peaks[changes.tensor] = peaks
            self.engine.write(carried)
            yield changes

    def replace(
        self, buckets: Sequence[Bucket], loaded: Sequence[Bucket], label: str, trainer: Sequence[int], engine: Sequence[int]
    ) -> None:
        for name, tensor in itertools.chain(*buckets):
            number = self.trainer.spec.index[name]
            if number in self._blocks:
                self._peaks[number] = self._blocks[number].peaks(bits_of(tensor))
        self.engine.replace(loaded, label, engine)
        super().replace(buckets, loaded, label, trainer, engine)


def served(trainer: HostCopy, quantization: str, run_id: str) -> Served:
    """What engines with rollout.quantization=`quantization` hold."""
    return Quantised(trainer, run_id) if quantization == "fp8" else Served(trainer)
