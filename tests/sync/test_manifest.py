"""Manifests: canonical text, every field checked, signatures."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.sync.manifest import (
    ANCHOR,
    MODEL_DIRECTORY,
    NO_ROOT,
    Manifest,
    ManifestError,
    PartRef,
    key_id_of,
    root_of,
    sign,
    verify,
)
from slime.sync.records import ModelSpec, TensorSpec

MODEL = ModelSpec((TensorSpec("a", (3,), "bfloat16"), TensorSpec("b", (2, 2), "float32"), TensorSpec("c", (), "bfloat16")))
KEY = b"0123456789abcdef"
PAYLOADS = (b"first", b"second")


def make(**values: Any) -> Manifest:
    made = {
        "run_id": "ab12",
        "epoch": 0,
        "number": 7,
        "parent_epoch": 0,
        "parent_number": 6,
        "kind": "delta",
        "signature": MODEL.signature,
        "codec": "steps",
        "part_bytes": 18,
        "parts": tuple(PartRef.of(i, payload) for i, payload in enumerate(PAYLOADS)),
        "fingerprints": (1, 2**64 - 1, 0),
        "parent_root": root_of((0, 0, 0)),
        "changed": (1, 4, 0),
        "created_s": 12.5,
    }
    return Manifest(**made | values)


def test_the_example_s_model_has_as_many_parts() -> None:
    assert len(MODEL.parts(18)) == len(PAYLOADS)
    make().check_model(MODEL)


def test_text_and_back() -> None:
    for manifest in (make(), sign(make(), KEY), make(parent_epoch=-1, parent_number=-1), make(run_id="quick.start-1_x")):
        text = manifest.to_json()
        assert Manifest.from_json(text) == Manifest.from_json(text.encode()) == manifest
    assert make().label == "ab12/0/7" and make().parent_label == "ab12/0/6" and make().nbytes == 11
    assert len(make().root) == 32 and make().root != make(fingerprints=(1, 2**64 - 2, 0)).root


BAD: dict[str, list[Any]] = {
    "format": [2, True, "1", None],
    "run_id": ["", "a/b", "../up", 3, "x" * 200, "a\n"],
    "epoch": [-1, 0.0, True, 2**63, "0", None],
    "number": [-1, 7.0, "7"],
    "parent_epoch": [-2, "0", 1.5],
    "parent_number": [-2, 7, 8, -1],
    "kind": ["full", None, ["delta"], {}],
    "signature": ["", "A" * 32, "0" * 31, 7],
    "codec": ["a b", 1, "x" * 65],
    "part_bytes": [0, 2**43, "16"],
    "parts": [None, [{}], ["part"], {"0": 1}],
    "fingerprints": [[1, 2, 3], ["0" * 15] * 3, ["0" * 16] * 2, None, ["-" + "0" * 15] * 3],
    "parent_root": ["", None, "g" * 32],
    "changed": [[1, 4], [1, 4, -1], [1, 4, 2**64], [1, 4, 0.0], {}],
    "created_s": [1, "now", None],
    "key_id": ["xyz", "0" * 16],
    "mac": ["0" * 63, "0" * 64, 7],
}


def test_every_field_is_tried() -> None:
    assert BAD.keys() == {"format", *(f.name for f in fields(Manifest))}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_wrong_values_are_named(name: str, value: Any) -> None:
    text = json.dumps(json.loads(make().to_json()) | {name: value}, sort_keys=True, separators=(",", ":"))
    with pytest.raises(ManifestError, match=name):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"nbytes": -1}, "nbytes -1"),
        ({"nbytes": 2**43}, "nbytes"),
        ({"digest": "0" * 64}, "not its place and digest"),
        ({"digest": "0"}, "64 hexadecimal"),
        ({"name": "../../etc/passwd"}, "name '../../etc"),
        ({"name": "part-0001.0000000000000000"}, "not its place"),
        ({"extra": 1}, "is not name, nbytes and digest"),
    ],
)
def test_parts_are_checked(part: dict[str, Any], says: str) -> None:
    values = json.loads(make().to_json())
    values["parts"][0] |= part
    with pytest.raises(ManifestError, match=says):
        Manifest.from_json(json.dumps(values, sort_keys=True, separators=(",", ":")))


def test_other_texts_are_refused() -> None:
    text = make().to_json()
    for other, says in (
        ("", "torn"),
        (text[:-1], "torn"),
        ("[" * 100_000, "torn"),
        ("[]", "not a JSON object"),
        (text.replace("12.5", "NaN"), "NaN is no number"),
        (text.replace("12.5", "1e999"), "created_s"),
        (text + " ", "canonical"),
        (text.replace('"kind":"delta"', '"kind":"delta","kind":"delta"'), "canonical"),
        (text.replace('{"changed"', '{"added":1,"changed"'), "unknown field 'added'"),
        (text.replace('"codec":"steps",', ""), "lacks 'codec'"),
        (b"\xff\xfe" + text.encode(), "torn"),
    ):
        with pytest.raises(ManifestError, match=says):
            Manifest.from_json(other)


def test_an_anchor_has_no_parent() -> None:
    anchor = make(kind=ANCHOR, parent_epoch=-1, parent_number=-1, parent_root=NO_ROOT)
    assert Manifest.from_json(anchor.to_json()).parent == MODEL_DIRECTORY
    for wrong in (replace(anchor, parent_epoch=0, parent_number=1), replace(anchor, parent_root=make().root)):
        with pytest.raises(ManifestError, match="an anchor has none"):
            Manifest.from_json(wrong.to_json())


@given(st.data())
def test_a_flipped_bit_is_refused_or_seen(data: st.DataObject) -> None:
    """Whatever bit of a signed manifest flips, it is not read, or not verified."""
    text = bytearray(sign(make(), KEY).to_json().encode())
    at = data.draw(st.integers(0, 8 * len(text) - 1))
    text[at // 8] ^= 1 << at % 8
    with pytest.raises(ManifestError):
        verify(Manifest.from_json(bytes(text)), KEY)


@given(st.binary(max_size=60))
def test_anything_else_is_a_manifest_error(text: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_signatures() -> None:
    signed = sign(make(), KEY)
    verify(signed, KEY)
    assert verify(Manifest.from_json(signed.to_json()), KEY) is None and signed.key_id == key_id_of(KEY)
    with pytest.raises(ManifestError, match="not signed"):
        verify(make(), KEY)
    with pytest.raises(ManifestError, match="is not this key's"):
        verify(signed, KEY + b"x")
    with pytest.raises(ManifestError, match="has 3 bytes"):
        sign(make(), b"abc")
    for name, value in (("number", 8), ("run_id", "ab13"), ("fingerprints", (1, 2, 3)), ("parts", signed.parts[:1]), ("created_s", 1.0)):
        with pytest.raises(ManifestError, match="altered or forged"):
            verify(replace(signed, **{name: value}), KEY)
    forged = replace(make(), key_id=key_id_of(KEY), mac="0" * 64)
    with pytest.raises(ManifestError, match="altered or forged"):
        verify(forged, KEY)


def test_it_must_speak_of_the_model() -> None:
    for wrong, says in (
        (make(signature="0" * 32), "another model's"),
        (make(parts=make().parts[:1]), "parts has 1 entries, this model has 2"),
        (make(part_bytes=1 << 20), "parts has 2 entries, this model has 1"),
        (make(fingerprints=(1, 2), changed=(1, 2)), "fingerprints has 2 entries for 3 tensors"),
        (make(changed=(4, 4, 0)), "changed says 4 of a, which has 3"),
    ):
        with pytest.raises(ManifestError, match=says):
            wrong.check_model(MODEL)


def test_parts_are_checked_against_their_bytes() -> None:
    part = PartRef.of(0, b"first")
    part.check(memoryview(b"first"), "x")
    with pytest.raises(ManifestError, match="4 bytes instead of 5: it is cut"):
        part.check(b"firs", "x")
    with pytest.raises(ManifestError, match="altered"):
        part.check(b"fIrst", "x")
