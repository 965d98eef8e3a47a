"""`slime sync`: a history of weights shown, proven, replayed, folded; what is wrong is named, and exit codes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.cli import sync
from slime.config.exits import ConfigError
from slime.sync.chain import NoWay
from slime.sync.fold import Made, Weights, anchor, difference
from slime.sync.history import collect
from slime.sync.manifest import Manifest, PartRef, sign
from slime.sync.records import ModelSpec, TensorSpec
from slime.sync.store import WeightStore
from slime.sync.store_local import LocalStore
from slime.sync.wire import encode_part

KEY, OTHER = "a key of 16 bytes", "another key of 16 bytes"
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.up_proj.weight": (30, 16),
    "model.layers.1.mlp.up_proj.weight": (30, 16),
}
MODEL = ModelSpec(
    (*(TensorSpec(name, shape, "bfloat16") for name, shape in SHAPES.items()), TensorSpec("model.norm.weight", (16,), "float32"))
)
PART_BYTES = 1500
VERSIONS = 5


@dataclass
class Place:
    """A model directory, a run's directory with its history, and the bits of every version."""

    model: Path
    run: Path
    bits: list[list[np.ndarray]]  # of the model directory, then of every version
    made: list[Made]

    @property
    def store(self) -> WeightStore:
        return WeightStore(LocalStore(self.run / "weights"), "ab12", KEY.encode())

    def file(self, pattern: str) -> Path:
        (found,) = (self.run / "weights/ab12").glob(pattern)
        return found


def tensors_of(bits: list[np.ndarray]) -> dict[str, torch.Tensor]:
    pairs = zip(MODEL.tensors, bits, strict=True)
    return {t.name: torch.from_numpy(b.view(np.uint8).copy()).view(getattr(torch, t.dtype)).reshape(t.shape) for t, b in pairs}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("RUN_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)
    random = np.random.default_rng(3)
    bits = [[random.integers(0, 1 << 8 * t.type.width, t.size, np.uint64).astype(t.type.bits) for t in MODEL.tensors]]
    model, run = tmp_path / "model", tmp_path / "runs/mine"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    (model / "tokenizer.json").write_text("{}")
    save_file(tensors_of(bits[0]) | {"mtp.weight": torch.ones(3)}, model / "model.safetensors")
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    made = Place(model, run, bits, [])
    weights, held = made.store, Weights(MODEL, "ab12", bits[0])
    weights.claim(0)
    weights.put_model(MODEL)
    for number in range(VERSIONS):
        now = [b.copy() for b in bits[-1]]
        now[number % 3][random.random(len(now[number % 3])) < 0.05] ^= 1
        now[1][7] ^= 2
        made.made.append(published(number, held, now))
        weights.publish(made.made[-1].manifest, made.made[-1].parts)
        held.apply(made.made[-1].manifest, made.made[-1].parts)
        bits.append(now)
    return made


def published(number: int, held: Weights, now: list[np.ndarray]) -> Made:
    listed = [difference(i, old, new) for i, (old, new) in enumerate(zip(held.bits, now, strict=True))]
    payloads = tuple(encode_part(MODEL, t, [listed[i][0] for i in t if len(listed[i][0])], "steps") for t in MODEL.parts(PART_BYTES))
    manifest = Manifest(
        run_id="ab12",
        epoch=0,
        number=number,
        parent_epoch=0 if number else -1,
        parent_number=number - 1,
        kind="delta",
        signature=MODEL.signature,
        codec="steps",
        part_bytes=PART_BYTES,
        parts=tuple(PartRef.of(i, payload) for i, payload in enumerate(payloads)),
        fingerprints=tuple(Weights(MODEL, "ab12", now).fingerprints),
        parent_root=held.root,
        changed=tuple(count for _, count in listed),
        created_s=1.8e9,
    )
    return Made(sign(manifest, KEY.encode()), payloads)


def add_anchor(place: Place, number: int) -> None:
    made = anchor(Weights(MODEL, "ab12", place.bits[number + 1]), place.made[number].manifest)
    place.store.add(sign(made.manifest, KEY.encode()), made.parts)


Slime = Callable[..., str]


@pytest.fixture
def slime(place: Place, capsys: pytest.CaptureFixture[str]) -> Slime:
    def call(command: str, *arguments: str) -> str:
        sync.main([command, str(place.run), *arguments])
        return capsys.readouterr().out

    return call


def test_what_there_is(place: Place, slime: Slime) -> None:
    add_anchor(place, 2)
    text = slime("inspect")
    rows = [line.split() for line in text.splitlines()]
    shown = [row[:4] for row in rows if row and row[0] in {f"0/{n}" for n in range(VERSIONS)}]
    assert [row[:3] for row in shown] == [
        ["0/0", "delta", "model"],
        ["0/1", "delta", "0/0"],
        ["0/2", "anchor", "nothing"],
        ["0/2", "delta", "0/1"],
        ["0/3", "delta", "0/2"],
        ["0/4", "delta", "0/3"],
    ]
    assert all(row[3] == str(len(MODEL.parts(PART_BYTES))) for row in shown)
    assert "run ab12, 1.6k weights in 4 tensors, 3.3kB whole; 6 of 6 manifests signed" in " ".join(text.split())  # wrapped after the path
    assert "ab12/0/4: delta from 0/3; most changed tensors" in text and "model.layers.1 " in text and "model.embed_tokens" in text
    manifest = place.made[4].manifest
    line = next(line for line in text.splitlines() if line.strip().startswith("model.layers.0.mlp.up_proj.weight"))
    assert f"{manifest.changed[1] / 480:.3%}" in line
    assert [row[1:3] for row in rows if row[:1] == ["steps8"]] == [["1", str(sum(manifest.changed))]], "how blocks are coded"


def test_one_version(place: Place, slime: Slime) -> None:
    text = slime("inspect", "--version", "1", "--top", "2")
    assert (
        "ab12/0/1: delta from 0/0" in text and "manifests signed" not in text and "model.norm.weight" not in text and "model.embed" in text
    )
    assert slime("inspect", "--version", "0/1", "--top", "2") == text
    with pytest.raises(ConfigError, match=r"no version 9 in .*; there are 0/0, 0/1, 0/2, 0/3, 0/4"):
        slime("inspect", "--version", "9")


def test_all_is_proven(place: Place, slime: Slime) -> None:
    add_anchor(place, 2)
    text = slime("verify", "--model", str(place.model), "--key-env", "RUN_KEY")
    assert "signatures are right" in text and "6 steps decoded, fingerprints proven at each\n" in text
    for made in place.made:
        assert f"{made.manifest.label} delta from" in text and made.manifest.root in text
    text = slime("verify")
    assert "signatures were not looked at (--key-env)" in text
    assert (
        "3 steps decoded, fingerprints proven at each; not decoded without --model: delta ab12/0/0, delta ab12/0/1, delta ab12/0/2" in text
    )


@pytest.mark.parametrize("pattern", ["0/v00000002/part-0001.*", "0/v00000002/manifest.json", "latest"])
def test_damage_is_named(place: Place, slime: Slime, pattern: str) -> None:
    file = place.file(pattern)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(RuntimeError) as raised:
        slime("verify", "--model", str(place.model), "--key-env", "RUN_KEY")
    assert file.name in str(raised.value) and "1 faults" in str(raised.value)


def test_a_missing_part_or_step(place: Place, slime: Slime) -> None:
    part = place.file("0/v00000001/part-0000.*")
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(RuntimeError, match=f"1 faults\n.*{part.name}: not there"):
        slime("verify", "--model", str(place.model))
    part.write_bytes(data)
    place.file("0/v00000001/manifest.json").unlink()
    with pytest.raises(RuntimeError, match="nothing leads to where delta ab12/0/2, delta ab12/0/3, delta ab12/0/4 begin"):
        slime("verify", "--model", str(place.model))


def test_bits_that_are_not_the_manifest_s(place: Place, slime: Slime) -> None:
    """A whole, signed version whose parts decode to something else: only the fingerprints tell."""
    wrong = place.made[3].manifest.fingerprints
    held = Weights(MODEL, "ab12", place.bits[4])
    now = [bits.copy() for bits in place.bits[5]]
    now[0][3] ^= 1
    made = published(4, held, now)
    manifest = sign(
        Manifest(**{**vars(made.manifest), "fingerprints": place.made[4].manifest.fingerprints, "key_id": "", "mac": ""}), KEY.encode()
    )
    place.file("0/v00000004/manifest.json").unlink()
    place.store.add(manifest, made.parts)
    with pytest.raises(RuntimeError, match=r"ab12/0/4: model.embed_tokens.weight differ from what the manifest proves"):
        slime("verify", "--model", str(place.model), "--key-env", "RUN_KEY")
    assert wrong != manifest.fingerprints


def test_forged_and_another_key(place: Place, slime: Slime) -> None:
    with pytest.raises(RuntimeError, match=r"no version of ab12 can be read: .* is not this key's"):
        slime("verify", "--key-env", "OTHER_KEY")
    with pytest.raises(ConfigError, match="--key-env=NO_KEY: no such environment variable"):
        slime("verify", "--key-env", "NO_KEY")


def test_another_model_directory(place: Place, slime: Slime, tmp_path: Path) -> None:
    tensors = load_file(place.model / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, place.model / "model.safetensors")
    with pytest.raises(
        RuntimeError, match=r"nothing leads to where delta ab12/0/0, .* begin: files are missing, or --model is another model"
    ):
        slime("verify", "--model", str(place.model))
    with pytest.raises(NoWay, match="no files lead from -1/-1 to 0/4"):
        slime("replay", "--model", str(place.model), "--to", "4", "--out", str(tmp_path / "out"))
    save_file({name: t for name, t in tensors.items() if "norm" not in name}, place.model / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model.norm.weight"):
        slime("verify", "--model", str(place.model))
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, place.model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), the run's has \(16,\): name its model.path"):
        slime("verify", "--model", str(place.model))


@pytest.mark.parametrize("number", [0, 4])
def test_a_version_as_a_model(place: Place, slime: Slime, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    text = slime("replay", "--model", str(place.model), "--to", str(number), "--out", str(out))
    assert f"ab12/0/{number}, root {place.made[number].manifest.root}, read back and proven" in text
    found, expected = load_file(out / "model.safetensors"), tensors_of(place.bits[number + 1])
    assert found.keys() == {*expected, "mtp.weight"} and torch.equal(found["mtp.weight"], torch.ones(3))
    assert all(torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items())
    assert (out / "tokenizer.json").is_file() and json.loads((out / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(ConfigError, match=r"--out=.* exists and is not an empty directory"):
        slime("replay", "--model", str(place.model), "--to", str(number), "--out", str(out))


def test_replay_from_an_anchor_where_deltas_are_gone(place: Place, slime: Slime, tmp_path: Path) -> None:
    add_anchor(place, 2)
    for number in (0, 1):
        place.store.remove(place.made[number].manifest)
    text = slime("replay", "--model", str(place.model), "--to", "4", "--out", str(tmp_path / "out"))
    assert "anchor from nothing to ab12/0/2" in text and "delta from 0/3 to ab12/0/4" in text
    found, expected = load_file(tmp_path / "out/model.safetensors"), tensors_of(place.bits[5])
    assert all(torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items())


def test_several_steps_as_one(place: Place, slime: Slime, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="versions are signed; name the key by --key-env"):
        slime("fold", "--model", str(place.model), "--from", "0", "--to", "4")
    text = slime("fold", "--model", str(place.model), "--from", "0", "--to", "4", "--key-env", "RUN_KEY")
    assert "ab12/0/4 from 0/0: 4 steps of" in text
    assert "ab12/0/4 fold from 0/0" in slime("verify", "--model", str(place.model), "--key-env", "RUN_KEY")
    replayed = slime("replay", "--model", str(place.model), "--to", "4", "--out", str(tmp_path / "out"))
    assert "fold from 0/0 to ab12/0/4" in replayed and "0/3" not in replayed
    text = slime("fold", "--model", str(place.model), "--from", "model", "--to", "2", "--key-env", "RUN_KEY", "--codec", "steps")
    assert "ab12/0/2 from model: 3 steps of" in text
    for first, last, says in (("4", "4", "0 steps lead"), ("3", "4", "1 steps lead")):
        with pytest.raises(ConfigError, match=says):
            slime("fold", "--model", str(place.model), "--from", first, "--to", last, "--key-env", "RUN_KEY")
    with pytest.raises(NoWay, match="no files lead from 0/4 to 0/2"):
        slime("fold", "--model", str(place.model), "--from", "4", "--to", "2", "--key-env", "RUN_KEY")


@pytest.mark.parametrize("keyed", [True, False])
def test_a_run_that_goes_on_deletes_nothing_that_is_read(
    place: Place, slime: Slime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    """Its trainer needs the deltas no more when the first is being read. Without the key of a signed run no lease is left, which the
    trainer could not read."""
    read, leases, due = WeightStore.part, place.run / "weights/ab12/leases", [True]
    held: list[int] = []

    def part(self: WeightStore, manifest: Manifest, index: int) -> bytes:
        if due:
            due.clear()
            if keyed:
                add_anchor(place, 4)
                collect(place.store, list(place.store.manifests()), [(0, 4)], time.time(), keep=1)
        held.append(len(list(leases.glob("sync-*"))))
        return read(self, manifest, index)

    monkeypatch.setattr(WeightStore, "part", part)
    named = ["--key-env", "RUN_KEY"] if keyed else []
    text = slime("replay", "--model", str(place.model), "--to", "4", "--out", str(tmp_path / "out"), *named)
    assert "delta from 0/3 to ab12/0/4" in text and set(held) == {int(keyed)} and not list(leases.glob("*"))


def test_a_fold_is_written_under_a_lease(place: Place, slime: Slime, monkeypatch: pytest.MonkeyPatch) -> None:
    add, held = WeightStore.add, []

    def seen(self: WeightStore, manifest: Manifest, parts: list[bytes]) -> None:
        held.append(len(self.leases()))
        add(self, manifest, parts)

    monkeypatch.setattr(WeightStore, "add", seen)
    slime("fold", "--model", str(place.model), "--from", "0", "--to", "4", "--key-env", "RUN_KEY")
    assert held == [1] and place.store.leases() == []


def test_places_without_a_history(place: Place, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where, says in ((tmp_path / "empty", "holds no weights; give a run's directory"), (tmp_path / "nowhere", "no such directory")):
        with pytest.raises(ConfigError, match=says):
            sync.main(["inspect", str(where)])
    other = WeightStore(LocalStore(place.run / "weights"), "cd34")
    other.claim(0)
    made = place.made[0].manifest
    other.add(Manifest(**{**vars(made), "run_id": "cd34", "key_id": "", "mac": ""}), place.made[0].parts)
    with pytest.raises(ConfigError, match="holds 2 runs: ab12, cd34; choose one by --run"):
        sync.main(["inspect", str(place.run)])
    with pytest.raises(ConfigError, match="--run=ef56: not in"):
        sync.main(["inspect", str(place.run), "--run", "ef56"])
    with pytest.raises(ConfigError, match="the list of tensors is gone"):
        sync.main(["inspect", str(place.run), "--run", "cd34"])


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command_itself(place: Place) -> None:
    def slime(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "slime.cli.main", "sync", *arguments], capture_output=True, text=True, timeout=120)

    done = slime("verify", str(place.run), "--model", str(place.model), "--key-env", "RUN_KEY")
    assert done.returncode == 0 and "5 steps decoded" in done.stdout, done.stderr
    place.file("latest").write_bytes(b"")
    assert slime("verify", str(place.run), "--key-env", "RUN_KEY").returncode == 1
    wrong = slime("inspect", str(place.run / "nowhere"))
    assert wrong.returncode == 2 and wrong.stderr.endswith("nowhere: no such directory\n")
    told = slime("--help").stdout
    assert "inspect" in told and "WHERE is a run's directory" in told and "--out" in slime("replay", "--help").stdout
