"""A version on its way into the engines of a host: a delta that is decoded against the host copy, or all tensors.

An `Incoming` is made when the version is offered, before any engine knows of it, and let go when the host copy has become the version, or
the publication was given up. Nothing in it changes the host copy before `apply`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from slime.engine.host_copy import HostCopy, Part, bits_of, tensor_of
from slime.engine.served import Served
from slime.sync import fingerprint, wire
from slime.sync.bursts import in_order
from slime.sync.livemap import LiveMap
from slime.sync.manifest import Manifest
from slime.sync.protocol import Bucket
from slime.sync.records import Changes, ModelSpec
from slime.sync.staging import Piece, Stage


class Incoming(Protocol):
    """A version that was offered."""

    label: str
    fingerprints: Sequence[int]  # of every tensor of the trainer
    of_engines: Sequence[int]  # of every tensor that engines hold

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """All its tensors, as engines load them."""
        ...

    def apply(self) -> None:
        """The host copy becomes this version."""
        ...


class IncomingWhole:
    """All tensors, as the trainer gathered them."""

    def __init__(self, served: Served, buckets: list[Bucket], label: str) -> None:
        """Raises ValueError where the buckets are not the tensors of the model, each once."""
        copy = served.trainer
        names = [name for bucket in buckets for name, _ in bucket]
        if sorted(names) != sorted(copy.spec.index):
            raise ValueError(f"weights {label}: {len(names)} tensors came for the {len(copy.spec.tensors)} of the model")
        self.label, self._served, self._buckets = label, served, buckets
        self.fingerprints = self.of_engines = _fingerprints(copy, buckets)
        self._loaded = [served.bucket(bucket) for bucket in buckets]
        if served.converts:
            self.of_engines = _fingerprints(served.engine, self._loaded)

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """As they came, whatever their size."""
        yield from self._loaded

    def apply(self) -> None:
        self._served.replace(self._buckets, self._loaded, self.label, self.fingerprints, self.of_engines)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A tensor that changes."""

    tensor: int
    after: int  # its fingerprint then
    in_engines: list[tuple[Changes, int]]  # what changes in theirs, with the fingerprints
    staged: list[list[Piece]]  # for each live map


class IncomingDelta:
    """A manifest and its parts. `payload` gives the bytes of a part; it is asked for each one anew whenever they are decoded."""

    def __init__(self, manifest: Manifest, payload: Callable[[int], bytes | memoryview], served: Served) -> None:
        """Raises ManifestError for a manifest of another model, or a part whose bytes are not the manifest's."""
        manifest.check_model(served.trainer.spec)
        for _ in in_order(lambda part: part[1].check(payload(part[0]), manifest.label), enumerate(manifest.parts)):
            pass
        self.manifest, self.label, self.fingerprints = manifest, manifest.label, manifest.fingerprints
        self.of_engines: Sequence[int] = served.engine.fingerprints  # `stage` finds those of this version
        self.opaque: Path | None = None  # tensors that engines hold in another form: at this version,
        self.opaque_before: Path | None = None  # and at the one before
        self._payload, self._served, self._copy = payload, served, served.trainer

    def parts(self) -> Iterator[Part]:
        """Each decodes a part against the host copy, and raises WireError where it does not decode."""
        for number, tensors in enumerate(self._copy.spec.parts(self.manifest.part_bytes)):
            yield partial(self._decoded, number, tensors)

    def _decoded(self, number: int, tensors: range) -> Iterator[Changes]:
        return wire.decode_part(self._copy.spec, tensors, self._payload(number), self._copy.bits)

    def stage(self, maps: Mapping[str, LiveMap], opaque: set[str], folder: Path, run_id: str) -> dict[str, Path]:
        """Write a staged file for every live map (by its signature), and the changed ones of the tensors that are opaque somewhere.

        Raises ValueError naming tensors whose decoded bits do not have the manifest's fingerprints.
        """
        stages = {signature: Stage(found, fingerprint.run_key(run_id)) for signature, found in maps.items()}
        engine = self._served.engine
        reached, self.of_engines = list(self._copy.fingerprints), list(engine.fingerprints)
        whole: list[Bucket] = [[], []]
        for part in in_order(partial(self._look, list(stages.values())), self.parts()):
            for seen in part:
                reached[seen.tensor] = seen.after
                for there, sum_there in seen.in_engines:
                    self.of_engines[there.tensor] = sum_there
                    if engine.spec.tensors[there.tensor].name in opaque:
                        whole[0].append(_tensor(engine, there.tensor, None))
                        whole[1].append(_tensor(engine, there.tensor, there))
                for stage, pieces in zip(stages.values(), seen.staged, strict=True):
                    stage.add(pieces)
        self._check(reached)
        paths = {signature: folder / f"{signature}.staged" for signature in stages}
        try:
            if whole[0]:
                self.opaque_before, self.opaque = folder / "opaque-before.safetensors", folder / "opaque.safetensors"
                save_file(dict(whole[0]), self.opaque_before)
                save_file(dict(whole[1]), self.opaque)
            for signature, stage in stages.items():
                stage.write(paths[signature], self.label, self.manifest.parent_label)
        except BaseException:  # no room, mostly: what is there would take some from the next
            for path in paths.values():
                path.unlink(missing_ok=True)
            self.forget()
            raise
        return paths

    def _look(self, stages: Sequence[Stage], part: Part) -> "list[_Seen]":
        """Every tensor that changes."""
        found = []
        for changes, after in self._copy.ahead(part()):
            in_engines = list(self._served.ahead(changes, after))
            staged = [[piece for there, _ in in_engines for piece in stage.pieces(there)] for stage in stages]
            found.append(_Seen(changes.tensor, after, in_engines, staged))
        return found

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        for part, tensors in zip(self.parts(), self._copy.spec.parts(self.manifest.part_bytes), strict=True):
            found = {changes.tensor: changes for changes in part()}
            yield self._served.bucket([_tensor(self._copy, i, found.get(i)) for i in tensors])

    def apply(self) -> None:
        self._served.apply(self.parts(), self.label, self.fingerprints, self.of_engines)

    def forget(self) -> None:
        """Remove the files of `stage` that only this object knows."""
        for path in (self.opaque, self.opaque_before):
            if path is not None:
                path.unlink(missing_ok=True)

    def _check(self, reached: Sequence[int]) -> None:
        spec: ModelSpec = self._copy.spec
        wrong = [t.name for t, found, meant in zip(spec.tensors, reached, self.fingerprints, strict=True) if found != meant]
        if wrong:
            raise ValueError(
                f"weights {self.label}: {len(wrong)} tensors decode to other bits than the trainer's, {wrong[0]} first: the host copy is "
                f"at {self._copy.label}, the delta begins from {self.manifest.parent_label}"
            )


def _tensor(copy: HostCopy, tensor: int, changes: Changes | None) -> tuple[str, torch.Tensor]:
    """A copy of a tensor with these changes."""
    bits = copy.bits(tensor).copy()
    if changes is not None:
        bits[changes.positions] = changes.new
    return copy.spec.tensors[tensor].name, tensor_of(copy.spec, tensor, bits)


def _fingerprints(copy: HostCopy, buckets: Iterable[Bucket]) -> list[int]:
    """Of every tensor of the copy's model, with the bits in the buckets."""
    found = {name: copy.fingerprint(copy.spec.index[name], bits_of(tensor)) for bucket in buckets for name, tensor in bucket}
    return [found[tensor.name] for tensor in copy.spec.tensors]
