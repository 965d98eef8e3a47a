"""All weights of a version as bits, brought from version to version and proven at each; several steps as one; a version made whole.

A fold has what differs between its two ends, so an element that went A -> B -> A is not in it. An anchor lists every element, as if
all had been zero before: it needs nothing else. Both have the fingerprints of the version that they lead to, and are made only from
weights that have them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slime.sync import fingerprint
from slime.sync.chain import Node, consecutive, source_of
from slime.sync.manifest import ANCHOR, FOLD, MODEL_DIRECTORY, NO_ROOT, Manifest, ManifestError, PartRef, root_of
from slime.sync.records import BLOCK, Changes, ModelSpec
from slime.sync.wire import DENSE_AT, decode_part, encode_part

DENSE = "dense"  # codec of anchors


class NotTheseWeights(RuntimeError):
    """Weights that are not those of the version they should be."""


@dataclass(frozen=True)
class Made:
    """A version in another form, not signed yet."""

    manifest: Manifest
    parts: tuple[bytes, ...]


class Weights:
    """The tensors of a model as bits, at some version of a run."""

    def __init__(self, model: ModelSpec, run_id: str, bits: Sequence[np.ndarray] | None = None) -> None:
        """`bits`: every tensor's, 1-D, such as the model directory's; they are replaced, not written to. None: zeros, for an anchor."""
        self.model, self.run_id = model, run_id
        key = fingerprint.run_key(run_id)
        self._table = fingerprint.table(key)
        self._keys = [fingerprint.tensor_key(key, tensor.name) for tensor in model.tensors]
        self.bits = [np.zeros(t.size, t.type.bits) for t in model.tensors] if bits is None else list(bits)
        for tensor, held in zip(model.tensors, self.bits, strict=True):
            assert held.dtype == tensor.type.bits and held.shape == (tensor.size,), tensor.name
        self.fingerprints = [self._fingerprint(i) for i in range(len(self.bits))]
        self.order = MODEL_DIRECTORY

    @property
    def root(self) -> str:
        return root_of(self.fingerprints)

    @property
    def node(self) -> Node:
        return self.order, self.root

    def copy(self) -> "Weights":
        """Other weights, the same bits; neither writes to them."""
        made = copy.copy(self)
        made.bits, made.fingerprints = list(self.bits), list(self.fingerprints)
        return made

    def old_of(self, tensor: int) -> np.ndarray:
        """Bits of a tensor; only read."""
        return self.bits[tensor]

    def apply(self, manifest: Manifest, parts: Sequence[bytes]) -> list[Changes]:
        """Go one step, and prove that it led where it should. Returns what was listed, with the bits before.

        Raises ManifestError for a step of another model or from elsewhere, WireError for parts that cannot be decoded, NotTheseWeights
        naming the tensors that differ; the weights are then what they were.
        """
        manifest.check_model(self.model)
        if manifest.kind != ANCHOR and source_of(manifest) != self.node:
            raise ManifestError(
                f"{manifest.label} begins from {manifest.parent_label} (root {manifest.parent_root}), here is "
                f"{self.run_id}/{self.order[0]}/{self.order[1]} (root {self.root}): take the steps in order, from the right model directory"
            )
        zeros = manifest.kind == ANCHOR
        before, prints, found = list(self.bits), list(self.fingerprints), []
        try:
            for tensors, payload in zip(self.model.parts(manifest.part_bytes), parts, strict=True):
                for changes in decode_part(self.model, tensors, payload, self._zeros if zeros else self.old_of):
                    self._write(changes, zeros)
                    found.append(changes)
            self._prove(manifest)
        except BaseException:
            self.bits, self.fingerprints = before, prints
            raise
        self.order = manifest.order
        return found

    def _write(self, changes: Changes, zeros: bool) -> None:
        now = np.zeros_like(self.bits[changes.tensor]) if zeros else self.bits[changes.tensor].copy()
        now[changes.positions] = changes.new
        self.bits[changes.tensor] = now
        self.fingerprints[changes.tensor] = self._fingerprint(changes.tensor)

    def _prove(self, manifest: Manifest) -> None:
        wrong = [t.name for t, is_, due in zip(self.model.tensors, self.fingerprints, manifest.fingerprints, strict=True) if is_ != due]
        if wrong:
            named = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            raise NotTheseWeights(
                f"{manifest.label}: {named} differ from what the manifest proves: the chain is damaged, or was made wrongly"
            )

    def _zeros(self, tensor: int) -> np.ndarray:
        return np.zeros_like(self.bits[tensor])

    def _fingerprint(self, tensor: int) -> int:
        return fingerprint.full(np.ascontiguousarray(self.bits[tensor]), self._keys[tensor], self._table)


def fold(base: Weights, steps: Sequence[tuple[Manifest, Sequence[bytes]]], codec: str) -> Made:
    """Consecutive steps (manifest and parts), the first beginning from `base`, as one; `base` is at their end then.

    Raises ValueError for steps that do not follow one another, and what `Weights.apply` raises. Memory: what the steps change, twice.
    """
    manifests = [manifest for manifest, _ in steps]
    assert manifests, "a fold has steps"
    consecutive(manifests)
    first, last = manifests[0], manifests[-1]
    if first.kind == ANCHOR:
        raise ManifestError(f"{first.label}: an anchor leads there from anywhere; a fold begins with a delta")
    before = list(base.bits)
    for manifest, parts in steps:
        base.apply(manifest, parts)
    model = base.model
    payloads, counts = [], [0] * len(model.tensors)
    for tensors in model.parts(last.part_bytes):
        listed = []
        for tensor in tensors:
            if before[tensor] is not base.bits[tensor]:
                changes, counts[tensor] = difference(tensor, before[tensor], base.bits[tensor])
                listed.append(changes)
        payloads.append(encode_part(model, tensors, [c for c in listed if len(c)], codec, before.__getitem__))
    return _made(
        replace(last, kind=FOLD, parent_epoch=first.parent_epoch, parent_number=first.parent_number, parent_root=first.parent_root),
        codec,
        payloads,
        counts,
    )


def difference(tensor: int, old: np.ndarray, new: np.ndarray) -> tuple[Changes, int]:
    """What the publisher would list of a tensor's bits (1-D), complete blocks included, and how many elements differ."""
    differs = old != new
    count = int(np.count_nonzero(differs))
    for start in range(0, len(old), BLOCK):
        block = differs[start : start + BLOCK]
        if np.count_nonzero(block) > DENSE_AT * len(block):
            block[:] = True
    positions = np.flatnonzero(differs).astype(np.int64)
    return Changes(tensor, positions, old[positions], new[positions]), count


def anchor(weights: Weights, version: Manifest) -> Made:
    """`version`, which `weights` are, whole. Raises NotTheseWeights where they are not."""
    weights._prove(version)
    payloads = []
    for tensors in weights.model.parts(version.part_bytes):
        listed = [Changes(i, np.arange(len(b), dtype=np.int64), np.zeros_like(b), b) for i in tensors if len(b := weights.bits[i])]
        payloads.append(encode_part(weights.model, tensors, listed, DENSE))
    epoch, number = MODEL_DIRECTORY
    whole = replace(version, kind=ANCHOR, parent_epoch=epoch, parent_number=number, parent_root=NO_ROOT)
    return _made(whole, DENSE, payloads, [tensor.size for tensor in weights.model.tensors])


def _made(manifest: Manifest, codec: str, payloads: Sequence[bytes], changed: Sequence[int]) -> Made:
    refs = tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads))
    return Made(replace(manifest, codec=codec, parts=refs, changed=tuple(changed), key_id="", mac=""), tuple(payloads))
