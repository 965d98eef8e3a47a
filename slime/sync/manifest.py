"""The manifest of a version: which parts it consists of, what it begins from, what every tensor is at its end, and who says so.

    Manifest(run_id="ab12", epoch=0, number=7, parent_epoch=0, parent_number=6, kind="delta", parts=(PartRef(...), ...), ...)

It is written after its parts and read before them: a version without a valid manifest does not exist. Its JSON is canonical (sorted keys,
no blanks), so that equal manifests are equal bytes. `sign` authenticates those bytes by HMAC-SHA256 and the parts by their digests in
them; (epoch, number), which only grow within a run, tell a replay (see states.py).
"""

import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from slime.sync.records import ModelSpec
from slime.types import WeightVersion

FORMAT = 1
DELTA, FOLD, ANCHOR = "delta", "fold", "anchor"  # one step | several consecutive steps as one | stands alone
KINDS = (DELTA, FOLD, ANCHOR)
MODEL_DIRECTORY = (-1, -1)  # the parent of a run's first version: what model.path holds
NO_ROOT = "0" * 32  # parent_root of an anchor
MAX_BYTES = 1 << 28  # of a manifest; a million tensors need 64 MB
MAX_PART_BYTES = 1 << 42
MAX_TENSORS = 1 << 22
_U64 = 1 << 64
_NAME = re.compile(r"part-[0-9]{4,7}\.[0-9a-f]{16}")
_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_WORD = re.compile(r"[A-Za-z0-9_.-]{0,64}")


class ManifestError(ValueError):
    """A manifest that is torn, forged, or of another model."""


@dataclass(frozen=True, slots=True)
class PartRef:
    """A part as the manifest knows it."""

    name: str  # part-0003.<first 16 digits of digest>
    nbytes: int
    digest: str  # blake2b-256 of its bytes, 64 hexadecimal digits

    @classmethod
    def of(cls, index: int, payload: bytes | memoryview) -> "PartRef":
        """Names part `index` of a version."""
        digest = hashlib.blake2b(payload, digest_size=32).hexdigest()
        return cls(f"part-{index:04d}.{digest[:16]}", len(payload), digest)

    def check(self, payload: bytes | memoryview, label: str) -> None:
        """Raises ManifestError unless these are the bytes that the manifest of `label` speaks of."""
        if len(payload) != self.nbytes:
            raise ManifestError(f"{label}: {self.name} has {len(payload)} bytes instead of {self.nbytes}: it is cut; fetch it again")
        if hashlib.blake2b(payload, digest_size=32).hexdigest() != self.digest:
            raise ManifestError(f"{label}: {self.name} was altered (its digest does not match); fetch it again")


@dataclass(frozen=True)
class Manifest:
    """A version, complete. `sign` fills key_id and mac; where both are empty it is not authenticated."""

    run_id: str
    epoch: int
    number: int
    parent_epoch: int
    parent_number: int
    kind: str  # of KINDS
    signature: str  # ModelSpec.signature
    codec: str
    part_bytes: int  # ModelSpec.parts(part_bytes) are the tensors of each part
    parts: tuple[PartRef, ...]
    fingerprints: tuple[int, ...]  # of every tensor at this version, see fingerprint.py
    parent_root: str  # root of the parent's fingerprints
    changed: tuple[int, ...]  # elements of every tensor that differ from the parent; of an anchor all
    created_s: float = 0.0  # Unix time, to show; never used to order
    key_id: str = ""
    mac: str = ""

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(self.epoch, self.number, self.run_id)

    @property
    def label(self) -> str:
        return self.version.label

    @property
    def order(self) -> tuple[int, int]:
        """Grows with every version of a run."""
        return self.epoch, self.number

    @property
    def parent(self) -> tuple[int, int]:
        return self.parent_epoch, self.parent_number

    @property
    def parent_label(self) -> str:
        return WeightVersion(self.parent_epoch, self.parent_number, self.run_id).label

    @property
    def root(self) -> str:
        """32 hexadecimal digits that stand for the weights of this version."""
        return root_of(self.fingerprints)

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts)

    def to_json(self) -> str:
        """Canonical; fingerprints as 16 hexadecimal digits."""
        return _canonical(_values(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """What `to_json` wrote. Raises ManifestError naming the field for anything else. It checks form alone: `check_model` and `verify`
        say whether it is meant and genuine."""
        if len(text) > MAX_BYTES:
            raise ManifestError(f"manifest of {len(text)} bytes, more than {MAX_BYTES}: it is none; fetch it again")
        try:
            values = json.loads(text, parse_constant=_not_a_number)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"manifest is torn ({error}); fetch it again") from None
        manifest = cls(**_read(values))
        again = text.encode() if isinstance(text, str) else bytes(text)
        if manifest.to_json().encode() != again:
            raise ManifestError(f"manifest of {manifest.label} is not in canonical form: it was altered; fetch it again")
        return manifest

    def check_model(self, model: ModelSpec) -> None:
        """Raises ManifestError unless the manifest speaks of this model, with a part for each run of tensors and a fingerprint for each."""
        if self.signature != model.signature:
            raise ManifestError(
                f"{self.label}: signature {self.signature} is another model's (here {model.signature}): names, shapes, dtypes or order "
                "differ; start engines and trainer from the same model.path and slime"
            )
        parts, tensors = len(model.parts(self.part_bytes)), len(model.tensors)
        if len(self.parts) != parts:
            raise ManifestError(f"{self.label}: parts has {len(self.parts)} entries, this model has {parts} parts; fetch it again")
        for name in ("fingerprints", "changed"):
            if len(getattr(self, name)) != tensors:
                raise ManifestError(f"{self.label}: {name} has {len(getattr(self, name))} entries for {tensors} tensors; fetch it again")
        for tensor, changed in zip(model.tensors, self.changed, strict=True):
            if changed > tensor.size:
                raise ManifestError(
                    f"{self.label}: changed says {changed} of {tensor.name}, which has {tensor.size} elements; fetch it again"
                )


def root_of(fingerprints: Sequence[int]) -> str:
    """32 hexadecimal digits: equal for equal fingerprints in the same order, so also for a delta, a fold and an anchor of one version."""
    return hashlib.blake2b(b"".join(f.to_bytes(8, "little") for f in fingerprints), digest_size=16).hexdigest()


def key_id_of(key: bytes) -> str:
    """16 hexadecimal digits that name a key and do not tell it."""
    return hashlib.blake2b(key, digest_size=8, person=b"slime.key").hexdigest()


def sign(manifest: Manifest, key: bytes) -> Manifest:
    """The manifest with key_id and mac. Raises ManifestError for a key of fewer than 16 bytes."""
    if len(key) < 16:
        raise ManifestError(f"the key has {len(key)} bytes; use 16 or more random ones")
    named = replace(manifest, key_id=key_id_of(key), mac="")
    return replace(named, mac=_mac(named, key))


def verify(manifest: Manifest, key: bytes) -> None:
    """Raises ManifestError unless who made the manifest has the key."""
    if not manifest.mac:
        raise ManifestError(f"{manifest.label}: not signed, but a key is set; publish with the same key, or unset it here")
    if manifest.key_id != key_id_of(key):
        raise ManifestError(f"{manifest.label}: key_id {manifest.key_id} is not this key's ({key_id_of(key)}); set the publisher's key")
    if not hmac.compare_digest(manifest.mac, _mac(replace(manifest, mac=""), key)):
        raise ManifestError(f"{manifest.label}: mac does not match: the manifest was altered or forged; fetch it again from the publisher")


def _mac(manifest: Manifest, key: bytes) -> str:
    return hmac.new(key, manifest.to_json().encode(), "sha256").hexdigest()


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _values(manifest: Manifest) -> dict[str, Any]:
    values = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    values["parts"] = [asdict(part) for part in manifest.parts]
    values["fingerprints"] = [f"{f:016x}" for f in manifest.fingerprints]
    return {"format": FORMAT, **values}


def _not_a_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


# --- reading what somebody sent ---------------------------------------------------------------------------------------


def _read(values: Any) -> dict[str, Any]:
    """The arguments of a Manifest."""
    if not isinstance(values, dict):
        raise ManifestError("manifest is not a JSON object; fetch it again")
    found = values.get("format")
    if not _is_int(found, 0, _U64) or found != FORMAT:
        raise ManifestError(f"manifest has format {_shown(found)}, this version of slime reads {FORMAT}; use the publisher's version")
    names = {"format", *(f.name for f in fields(Manifest))}
    for name in sorted(names ^ values.keys()):
        raise ManifestError(f"manifest {'lacks' if name in names else 'has an unknown field'} {_shown(name)}; fetch it again")
    read = {
        "run_id": _text(values, "run_id", _RUN_ID, "letters, digits, '_', '.', '-', at most 128"),
        **{name: _number(values, name, 0, 1 << 62) for name in ("epoch", "number")},
        **{name: _number(values, name, -1, 1 << 62) for name in ("parent_epoch", "parent_number")},
        "kind": _kind(values),
        "signature": _hex(values, "signature", 32),
        "codec": _text(values, "codec", _WORD, "a word"),
        "part_bytes": _number(values, "part_bytes", 1, MAX_PART_BYTES),
        "parts": tuple(_part(i, part) for i, part in enumerate(_list(values, "parts"))),
        "fingerprints": tuple(int(_hex({"fingerprints": f}, "fingerprints", 16), 16) for f in _list(values, "fingerprints")),
        "parent_root": _hex(values, "parent_root", 32),
        "changed": tuple(_number({"changed": n}, "changed", 0, _U64 - 1) for n in _list(values, "changed")),
        "created_s": _time(values),
        "key_id": _hex(values, "key_id", 16, or_empty=True),
        "mac": _hex(values, "mac", 64, or_empty=True),
    }
    _check_order(read)
    return read


def _check_order(read: Mapping[str, Any]) -> None:
    order, parent = (read["epoch"], read["number"]), (read["parent_epoch"], read["parent_number"])
    if parent != MODEL_DIRECTORY and min(parent) < 0:
        raise ManifestError(f"manifest has parent_epoch, parent_number {parent}: both or none are -1 (the model directory); fetch it again")
    if read["kind"] == ANCHOR and parent != MODEL_DIRECTORY:
        raise ManifestError(f"manifest has parent_epoch, parent_number {parent}, but an anchor has none (-1, -1); fetch it again")
    if read["kind"] == ANCHOR and read["parent_root"] != NO_ROOT:
        raise ManifestError(f"manifest has parent_root {read['parent_root']}, but an anchor has none ({NO_ROOT}); fetch it again")
    if parent >= order:
        raise ManifestError(f"manifest has parent_epoch, parent_number {parent}, which is not before {order}; fetch it again")
    if len(read["fingerprints"]) != len(read["changed"]):
        raise ManifestError(f"manifest has {len(read['fingerprints'])} fingerprints and {len(read['changed'])} changed; fetch it again")
    if bool(read["mac"]) != bool(read["key_id"]):
        raise ManifestError("manifest has one of key_id and mac without the other; fetch it again")


def _kind(values: Mapping[str, Any]) -> str:
    if values["kind"] not in KINDS:
        raise ManifestError(f"manifest has kind {_shown(values['kind'])}, there are {', '.join(KINDS)}; fetch it again")
    return values["kind"]


def _part(index: int, value: Any) -> PartRef:
    if not isinstance(value, dict) or value.keys() != {"name", "nbytes", "digest"}:
        raise ManifestError(f"manifest: parts[{index}] is not name, nbytes and digest; fetch it again")
    part = PartRef(
        _text(value, "name", _NAME, "part-NNNN.<digits>"), _number(value, "nbytes", 0, MAX_PART_BYTES), _hex(value, "digest", 64)
    )
    if part.name != f"part-{index:04d}.{part.digest[:16]}":
        raise ManifestError(f"manifest: parts[{index}] has name {part.name}, not its place and digest; fetch it again")
    return part


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values[name]
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise ManifestError(f"manifest: {name} is not a list of at most {MAX_TENSORS}; fetch it again")
    return value


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(values: Mapping[str, Any], name: str, low: int, high: int) -> int:
    if not _is_int(values[name], low, high):
        raise ManifestError(f"manifest has {name} {_shown(values[name])}, not a whole number of {low} to {high}; fetch it again")
    return values[name]


def _text(values: Mapping[str, Any], name: str, form: re.Pattern[str], said: str) -> str:
    value = values[name]
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ManifestError(f"manifest has {name} {_shown(value)}, not {said}; fetch it again")
    return value


def _hex(values: Mapping[str, Any], name: str, digits: int, or_empty: bool = False) -> str:
    value = values[name]
    if or_empty and value == "":
        return ""
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
        raise ManifestError(f"manifest has {name} {_shown(value)}, not {digits} hexadecimal digits; fetch it again")
    return value


def _time(values: Mapping[str, Any]) -> float:
    value = values["created_s"]
    if not isinstance(value, float) or not math.isfinite(value):
        raise ManifestError(f"manifest has created_s {_shown(value)}, not a time in seconds; fetch it again")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:80]
