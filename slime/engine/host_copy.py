"""What a host agent holds of the committed version: every Hugging Face tensor as bits, in host memory.

It is the base that deltas are decoded against, and what a restarted or late engine is filled from. It changes only after every engine has
proven the next version, by `apply`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from slime.models.hf_files import HFReader
from slime.sync import fingerprint
from slime.sync.bits import INTEGERS
from slime.sync.bursts import in_order
from slime.sync.protocol import Bucket
from slime.sync.records import Changes, ModelSpec

Part = Callable[[], Iterable[Changes]]  # the changes of some tensors; of several parts each has others. Called by any thread


class HostCopy:
    """Tensors of one version. `label` names it; `fingerprints` are those of the bits that are held."""

    def __init__(self, spec: ModelSpec, run_id: str, label: str, bits: list[np.ndarray]) -> None:
        """`bits[i]` holds tensor i, flat, writable."""
        self.spec, self.label, self._bits = spec, label, bits
        key = fingerprint.run_key(run_id)
        self._table = fingerprint.table(key)
        self._keys = [fingerprint.tensor_key(key, tensor.name) for tensor in spec.tensors]
        self.fingerprints = [self.fingerprint(i, held) for i, held in enumerate(bits)]

    @classmethod
    def read(cls, spec: ModelSpec, directory: Path, run_id: str, label: str) -> "HostCopy":
        """The tensors of a model's directory, in the dtypes of `spec`. Raises ValueError for a tensor that is missing or misshapen."""
        bits = []
        with HFReader(directory) as reader:
            for tensor in spec.tensors:
                found = reader.read(tensor.name)
                if tuple(found.shape) != tensor.shape:
                    raise ValueError(f"model.path={directory}: {tensor.name} has shape {list(found.shape)}, not {list(tensor.shape)}")
                bits.append(bits_of(found.to(getattr(torch, tensor.dtype))).copy())
        return cls(spec, run_id, label, bits)

    def bits(self, tensor: int) -> np.ndarray:
        """The bits of a tensor, flat."""
        return self._bits[tensor]

    def ahead(self, found: Iterable[Changes]) -> Iterator[tuple[Changes, int]]:
        """Each tensor's changes with the fingerprint that it will have; nothing is changed."""
        for changes in found:
            grown = fingerprint.moved(changes.positions, changes.old, changes.new, self._keys[changes.tensor], self._table)
            yield changes, (self.fingerprints[changes.tensor] + grown) % (1 << 64)

    def apply(self, parts: Iterable[Part], label: str, fingerprints: Sequence[int]) -> None:
        """Become the version that the changes lead to."""
        for _ in in_order(lambda part: self.write(part()), parts):
            pass
        self.label, self.fingerprints = label, list(fingerprints)

    def write(self, found: Iterable[Changes]) -> None:
        """Take over some of the changes of a version that `apply` ends."""
        for changes in found:
            self._bits[changes.tensor][changes.positions] = changes.new

    def replace(self, buckets: Iterable[Bucket], label: str, fingerprints: Sequence[int]) -> None:
        """Become the version whose tensors these are, all of them."""
        for bucket in buckets:
            for name, tensor in bucket:
                self._bits[self.spec.index[name]][:] = bits_of(tensor)
        self.label, self.fingerprints = label, list(fingerprints)

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """All tensors, for a load of everything; views of what is held."""
        for part in self.spec.parts(bucket_bytes):
            yield [(self.spec.tensors[i].name, tensor_of(self.spec, i, self._bits[i])) for i in part]

    def fingerprint(self, tensor: int, bits: np.ndarray) -> int:
        """The fingerprint that tensor number `tensor` has with these bits."""
        return fingerprint.full(bits, self._keys[tensor], self._table)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits, flat; a view where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    width = flat.element_size()
    return flat.view(INTEGERS[width]).numpy().view(f"<u{width}")


def tensor_of(spec: ModelSpec, tensor: int, bits: np.ndarray) -> torch.Tensor:
    """The tensor that the bits are of; shares their memory."""
    described = spec.tensors[tensor]
    signed = torch.from_numpy(bits.view(f"<i{described.type.width}" if described.type.width > 1 else "<u1"))
    return signed.view(getattr(torch, described.dtype)).reshape(described.shape)
