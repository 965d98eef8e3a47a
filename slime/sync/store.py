"""Versions of weights as files: on a `Store` of named bytes (places.py) a `WeightStore` that no crash, flip or second trainer makes lie.

    <run_id>/0/v00000123/part-0000.5c0f1e2d3c4b5a69 ...      parts, named by their content: immutable
    <run_id>/0/v00000123/manifest.json                       after all parts, once, never replaced: now the version exists
    <run_id>/0/v00000123/anchor/..., fold.0.115/...          the same version, whole or from version 115 of epoch 0 on
    <run_id>/latest                                          the newest version; replaced on condition that nobody else did
    <run_id>/model.<signature>.json                          the tensors that travel, before the first version
    <run_id>/leases/<who>                                    what a late joiner still reads, see chain.py

The order of writes is the order of this list, and each is durable before the next begins: the pointer never leads the bytes. Files are read
by exact name; a listing only suggests names.
"""

import hashlib
import hmac
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from slime.sync.chain import Lease
from slime.sync.manifest import ANCHOR, DELTA, FOLD, MAX_BYTES, MODEL_DIRECTORY, NO_ROOT, Manifest, ManifestError, verify
from slime.sync.places import SMALL, Missing, Patient, Store
from slime.sync.records import ModelSpec

log = logging.getLogger(__name__)

LATEST = "latest"
LEASES = "leases"
PARALLEL = 8  # files written or read at once
T = TypeVar("T")
_FOLDER = re.compile(r"(\d+)/v(\d{8,})(?:/(anchor|fold\.(-?\d+)\.(-?\d+)))?/manifest\.json")


class SplitBrain(RuntimeError):
    """Another trainer publishes the same run: this one must stop."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """A manifest's place: a version as a delta, a fold from `base` on, or an anchor."""

    epoch: int
    number: int
    kind: str = DELTA
    base: tuple[int, int] = MODEL_DIRECTORY  # of a fold

    @classmethod
    def of(cls, manifest: Manifest) -> "Artefact":
        return cls(*manifest.order, manifest.kind, manifest.parent if manifest.kind == FOLD else MODEL_DIRECTORY)

    @property
    def folder(self) -> str:
        below = {DELTA: "", ANCHOR: "/anchor", FOLD: f"/fold.{self.base[0]}.{self.base[1]}"}[self.kind]
        return f"{self.epoch}/v{self.number:08d}{below}"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What `latest` holds."""

    epoch: int  # of the newest version; (-1, -1) where none is published yet
    number: int
    root: str
    claim: int  # epoch in which a trainer may publish
    publisher: str  # and who that is, unique to a process


class WeightStore:
    """The versions of one run."""

    def __init__(self, store: Store, run_id: str, key: bytes | None = None, publisher: str = "") -> None:
        """With `key`, manifests and pointer must be signed by it. `publisher` tells people who this is; a random word is added."""
        self.store, self.run_id = store, run_id
        self._key = key
        self.publisher = f"{publisher or 'trainer'}-{uuid.uuid4().hex[:8]}"
        self._pointer: bytes | None = None  # what this publisher wrote last
        self._seen: tuple[int, int] = MODEL_DIRECTORY  # the newest version that was read: an older pointer is a replay

    # --- publishing ---------------------------------------------------------------------------------------------------

    def claim(self, at_least: int) -> tuple[int, Pointer]:
        """Become the run's publisher. Returns the epoch to publish in, newer than any that was claimed before, and the newest version. A
        trainer that published before finds out when it next does. Raises SplitBrain where another claims just now, ManifestError where the
        pointer is damaged. One from before there was a key is taken over: that gives away no more than a pointer that is gone."""
        raw = self._raw_pointer()
        try:
            before = Pointer(*MODEL_DIRECTORY, NO_ROOT, -1, "") if raw is None else self._read_pointer(raw)
        except ManifestError:
            if self._key is None or raw is None:
                raise
            before = WeightStore(self.store, self.run_id)._read_pointer(raw)
            log.warning("%s was written without a key; from now on it is signed", self._at(LATEST))
        epoch = max(at_least, before.claim + 1)
        self._move(Pointer(before.epoch, before.number, before.root, epoch, self.publisher), raw)
        return epoch, before

    def publish(self, manifest: Manifest, parts: Sequence[bytes]) -> None:
        """Make a version exist and be the newest. May be called again after an error. Raises SplitBrain where another trainer publishes,
        ManifestError for parts that are not the manifest's, OSError where the place refuses."""
        assert self._pointer is not None, "claim comes first"
        now = self._read_pointer(self._pointer)
        assert manifest.kind != DELTA or (manifest.epoch == now.claim and manifest.order >= (now.epoch, now.number)), (manifest.label, now)
        self.add(manifest, parts)
        self._move(Pointer(*manifest.order, manifest.root, now.claim, self.publisher), self._pointer)

    def add(self, manifest: Manifest, parts: Sequence[bytes]) -> None:
        """Write parts and manifest, such as of an anchor or a fold, and leave the pointer alone."""
        assert manifest.run_id == self.run_id, (manifest.run_id, self.run_id)
        if len(parts) != len(manifest.parts):
            raise ManifestError(f"{manifest.label}: {len(parts)} parts given, the manifest names {len(manifest.parts)}")
        for part, payload in zip(manifest.parts, parts, strict=True):
            part.check(payload, manifest.label)
        folder, text = self._folder(Artefact.of(manifest)), manifest.to_json().encode()
        self._each(lambda i: self.store.put(f"{folder}/{manifest.parts[i].name}", bytes(parts[i])), len(parts))
        if not self.store.put_if(f"{folder}/manifest.json", text, None) and self.store.get(f"{folder}/manifest.json", MAX_BYTES) != text:
            raise SplitBrain(
                f"{self._at(folder)}: another trainer has published {manifest.label}; {self.publisher} must stop: one run has one trainer"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    def latest(self) -> Pointer | None:
        """The newest version, whose bytes are all there; None where none was published. Raises ManifestError for a pointer that is damaged,
        forged, or older than one that was read before."""
        raw = self._raw_pointer()
        if raw is None or (pointer := self._read_pointer(raw)).number < 0:
            return None
        if (pointer.epoch, pointer.number) < self._seen:
            raise ManifestError(f"{self._at(LATEST)}: leads to {pointer.epoch}/{pointer.number}, but {self._seen} was there: a replay")
        self._seen = (pointer.epoch, pointer.number)
        return pointer

    def manifest(self, artefact: Artefact) -> Manifest:
        """Raises Missing where it does not exist, ManifestError where it is torn, forged, or of another place."""
        name = f"{self._folder(artefact)}/manifest.json"
        get = self.store.get_soon if isinstance(self.store, Patient) and self._announced(artefact) else self.store.get
        try:
            manifest = Manifest.from_json(get(name, MAX_BYTES))
            if manifest.run_id != self.run_id or Artefact.of(manifest) != artefact:
                raise ManifestError(f"it is the {manifest.kind} of {manifest.label}: a replay, or a file that was moved")
            if self._key is not None:
                verify(manifest, self._key)
        except ManifestError as error:
            raise ManifestError(f"{self.store.where}/{name}: {error}") from error
        return manifest

    def part(self, manifest: Manifest, index: int) -> bytes:
        """The bytes of a part, as the manifest has them. Raises ManifestError where they are not, Missing where there are none."""
        part, folder = manifest.parts[index], self._folder(Artefact.of(manifest))
        payload = self.store.get(f"{folder}/{part.name}", part.nbytes)
        part.check(payload, f"{self.store.where}: {manifest.label}")
        return payload

    def parts(self, manifest: Manifest) -> list[bytes]:
        """All parts, read side by side."""
        return self._each(lambda i: self.part(manifest, i), len(manifest.parts))

    def artefacts(self) -> list[Artefact]:
        """Those that a listing shows, in the order of versions; each may be gone or damaged: `manifest` says."""
        found = []
        for name in self.store.list(self.run_id):
            if match := _FOLDER.fullmatch(name.removeprefix(f"{self.run_id}/")):
                epoch, number, special, base_epoch, base_number = match.groups()
                kind = DELTA if special is None else ANCHOR if special == ANCHOR else FOLD
                base = (int(base_epoch), int(base_number)) if kind == FOLD else MODEL_DIRECTORY
                found.append(Artefact(int(epoch), int(number), kind, base))
        return sorted(found, key=lambda a: (a.epoch, a.number, a.kind, a.base))

    def manifests(self, damaged: dict[Artefact, str] | None = None) -> Iterator[Manifest]:
        """Of all versions that exist. One that is torn, forged or signed with another key is left out, and `damaged` told why. Raises
        ManifestError for it where nobody is to be told."""
        for artefact in self.artefacts():
            try:
                yield self.manifest(artefact)
            except Missing:
                continue
            except ValueError as error:
                if damaged is None:
                    raise
                damaged[artefact] = str(error)

    def put_model(self, model: ModelSpec) -> None:
        """Write down which tensors travel, for those who only have the files."""
        self.store.put(f"{self.run_id}/model.{model.signature}.json", model.to_json().encode())

    def model(self, signature: str) -> ModelSpec:
        """The tensors of a manifest's signature. Raises Missing, or ManifestError where the file was altered."""
        name = f"{self.run_id}/model.{signature}.json"
        model = ModelSpec.from_json(self.store.get(name, MAX_BYTES).decode())
        if model.signature != signature:
            raise ManifestError(f"{self._at(name)}: it has signature {model.signature}: it was altered; take it from model.path")
        return model

    # --- leases -------------------------------------------------------------------------------------------------------

    def put_lease(self, lease: Lease) -> None:
        """Take a lease, or renew it."""
        self.store.put(f"{self.run_id}/{LEASES}/{lease.holder}", self.seal({**asdict(lease), "needs": list(lease.needs)}))

    def drop_lease(self, holder: str) -> None:
        self.store.delete(f"{self.run_id}/{LEASES}/{holder}")

    def leases(self) -> list[Lease]:
        """All that a listing shows, expired ones too. Raises ManifestError for one that is damaged: what it keeps is then not known."""
        found = []
        for name in self.store.list(f"{self.run_id}/{LEASES}"):
            try:
                values = self.unseal(self.store.get(name, MAX_BYTES))
                found.append(Lease(values["holder"], tuple(values["needs"]), values["expires_s"]))
            except Missing:
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise ManifestError(f"{self._at(name)}: damaged or forged ({error}); delete it if its holder is gone") from None
        return found

    # --- deleting -----------------------------------------------------------------------------------------------------

    def remove(self, manifest: Manifest) -> None:
        """The manifest goes first: what is half deleted does not exist."""
        folder = self._folder(Artefact.of(manifest))
        self.store.delete(f"{folder}/manifest.json")
        self._each(lambda i: self.store.delete(f"{folder}/{manifest.parts[i].name}"), len(manifest.parts))

    def sweep(self, before: tuple[int, int]) -> list[str]:
        """Delete parts of versions before `before` that have no manifest: of a publisher that was killed. Returns their names."""
        swept = []
        for name in self.store.list(self.run_id):
            folder, _, file = name.rpartition("/")
            match = re.fullmatch(r"(\d+)/v(\d{8,})(/.*)?", folder.removeprefix(f"{self.run_id}/"))
            if (
                match
                and file.startswith("part-")
                and (int(match[1]), int(match[2])) < before
                and not self.store.exists(f"{folder}/manifest.json")
            ):
                self.store.delete(name)
                swept.append(name)
        return swept

    # --- small files --------------------------------------------------------------------------------------------------

    def _raw_pointer(self) -> bytes | None:
        try:
            return self.store.get(f"{self.run_id}/{LATEST}", SMALL)
        except Missing:
            return None

    def _move(self, pointer: Pointer, expected: bytes | None) -> None:
        raw = self.seal(asdict(pointer))
        if not self.store.put_if(f"{self.run_id}/{LATEST}", raw, expected):
            other = self._raw_pointer()
            found = "it was deleted" if other is None else f"{self._read_pointer(other).publisher} publishes this run"
            raise SplitBrain(f"{self._at(LATEST)}: {found}; {self.publisher} must stop: one run has one trainer")
        self._pointer = raw

    def _read_pointer(self, raw: bytes) -> Pointer:
        try:
            return Pointer(**self.unseal(raw))
        except (ValueError, TypeError) as error:
            raise ManifestError(
                f"{self._at(LATEST)}: damaged or forged ({error}); `slime sync verify` tells which versions are whole"
            ) from None

    def seal(self, values: dict[str, Any]) -> bytes:
        """A small JSON object with a seal: HMAC-SHA256 where there is a key, else a digest against damage."""
        text = json.dumps(values, sort_keys=True)
        data = f"{self.run_id}\n{text}".encode()
        seal = hashlib.sha256(data).hexdigest() if self._key is None else hmac.new(self._key, data, "sha256").hexdigest()
        return json.dumps({"of": values, "seal": seal}, sort_keys=True).encode()

    def unseal(self, raw: bytes) -> dict[str, Any]:
        """Raises ValueError unless it was sealed with the same key and is whole."""
        sealed = json.loads(raw)
        if not isinstance(sealed, dict) or not isinstance(sealed.get("of"), dict):
            raise ValueError("not a sealed object")
        if not hmac.compare_digest(self.seal(sealed["of"]), raw):
            raise ValueError("its seal does not match")
        return sealed["of"]

    def _announced(self, artefact: Artefact) -> bool:
        return artefact.kind == DELTA and (artefact.epoch, artefact.number) == self._seen

    def _folder(self, artefact: Artefact) -> str:
        return f"{self.run_id}/{artefact.folder}"

    def _at(self, name: str) -> str:
        return f"{self.store.where}/{name if name.startswith(self.run_id) else f'{self.run_id}/{name}'}"

    @staticmethod
    def _each(call: Callable[[int], T], count: int) -> list[T]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(call, range(count)))
