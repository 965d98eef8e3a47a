"""The in-server part on a toy model, without SGLang: commits that fail on their way, several models in a process, any device."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slime.sync import fingerprint
from slime.sync.inserver import InserverRank
from slime.sync.inserver_client import command
from slime.sync.inserver_weights import Refused, Weights
from slime.sync.records import Changes
from slime.sync.staging import Stage
from tests.sync.test_livemap import SPEC, Toy, tensors

DEVICE = os.environ.get("SLIME_TEST_DEVICE", "cpu")
KEY = fingerprint.run_key("run")


def bits(tensor: torch.Tensor) -> np.ndarray:
    found = tensor.detach().cpu().contiguous().reshape(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
    return found.view(f"u{found.itemsize}")


def loaded(seed: int = 0) -> Toy:
    model = Toy().to(DEVICE)
    model.absorbed = model.absorbed.to(DEVICE)
    model.load_weights(tensors(seed))
    return model


def dump(model: Toy) -> list[np.ndarray]:
    return [bits(tensor) for tensor in [*model.parameters(), *model.buffers(), model.absorbed]]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def stage(weights: Weights, folder: Path, old: int, new: int, share: float = 0.4) -> str:
    """The file that makes the tensors of seed `new` of those of seed `old`, all elements listed that differ, some that do not."""
    made = Stage(weights.map, KEY)
    for number, ((_, before), (_, after)) in enumerate(zip(tensors(old), tensors(new), strict=True)):
        positions = np.flatnonzero(bits(before) != bits(after))
        made.add(made.pieces(Changes(number, positions, bits(before)[positions], bits(after)[positions])))
    made.write(folder / "staged", f"run/0/{new}", f"run/0/{old}")
    return str(folder / "staged")


def opaque(weights: Weights, seed: int) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in tensors(seed) if name in weights.map.opaque]


def test_commit_and_undo(tmp_path: Path) -> None:
    model = loaded(0)
    before = dump(model)
    weights = Weights(model, SPEC, "run", "run/0/0")
    assert same(before, dump(model)) and not weights.audit()[1]
    assert weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")
    assert same(before, dump(model))
    first = weights.audit()[0]
    weights.commit("run/0/1", "run/0/0", opaque(weights, 1))
    assert same(dump(model), dump(loaded(1))) and weights.held == "run/0/1"
    committed, changed = weights.audit()
    assert not changed and not (committed == first).any()
    weights.revert("run/0/1", opaque(weights, 0))
    assert same(before, dump(model)) and weights.held == "run/0/0"
    assert (weights.audit()[0] == first).all() and not weights.audit()[1]


def test_without_its_opaque_tensors_a_commit_is_not_whole(tmp_path: Path) -> None:
    """What the tests of a whole commit would miss if there were nothing opaque."""
    model = loaded(0)
    weights = Weights(model, SPEC, "run", "run/0/0")
    weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")
    weights.commit("run/0/1", "run/0/0")
    assert not same(dump(model), dump(loaded(1)))


def test_another_base_is_refused(tmp_path: Path) -> None:
    model = loaded(0)
    weights = Weights(model, SPEC, "run", "run/0/0")
    path = stage(weights, tmp_path, 0, 1)
    for flipped in (model.qk, model.scale, model.experts):
        element = flipped.data.view(-1)[:1].view({2: torch.int16, 4: torch.int32}[flipped.element_size()])
        element ^= 1
        before = dump(model)
        with pytest.raises(Refused, match="the live weights are not run/0/0: what run/0/1 would replace has other bits"):
            weights.stage(path, "run/0/1", "run/0/0")
        assert weights.staged is None and same(before, dump(model))
        element ^= 1
    weights.stage(path, "run/0/1", "run/0/0")


def test_tensors_of_another_device_are_left_alone() -> None:
    model = loaded(0)
    model.unused_workspace = torch.zeros(7, device="meta")
    assert "unused_workspace" not in [live.name for live in Weights(model, SPEC, "run").map.lives]


class Failing:
    """Iterates opaque tensors and fails."""

    def __init__(self, found: list[tuple[str, torch.Tensor]]) -> None:
        self.found = found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield self.found[0]
        raise OSError("the file ends here")


def test_a_commit_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(0)
    before = dump(model)
    weights = Weights(model, SPEC, "run", "run/0/0")
    derive = model.post_load_weights
    calls = iter([RuntimeError("no memory"), None])

    def once() -> None:
        if failure := next(calls):
            raise failure
        derive()

    weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")
    monkeypatch.setattr(model, "post_load_weights", once)
    with pytest.raises(RuntimeError, match="no memory"):
        weights.commit("run/0/1", "run/0/0")
    assert same(before, dump(model)) and weights.held == "run/0/0" and not weights.audit()[1]
    monkeypatch.undo()

    weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")
    with pytest.raises(OSError, match="ends here"):
        weights.commit("run/0/1", "run/0/0", Failing(opaque(weights, 1)))
    assert weights.held is None, "opaque tensors may be of either version"
    with pytest.raises(Refused, match="not staged"):
        weights.commit("run/0/1", "run/0/0")
    weights.revert("run/0/1", opaque(weights, 0))
    assert same(before, dump(model)) and weights.held == "run/0/0"


def test_a_commit_whose_undoing_fails_too_leaves_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(0)
    before = dump(model)
    weights = Weights(model, SPEC, "run", "run/0/0")
    weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")

    def fails() -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "post_load_weights", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        weights.commit("run/0/1", "run/0/0")
    assert weights.held is None
    monkeypatch.undo()
    weights.revert("run/0/1")
    assert weights.held == "run/0/0" and same(before, dump(model)) and not weights.audit()[1]


def test_a_load_that_fails_leaves_no_label(tmp_path: Path) -> None:
    weights = Weights(loaded(0), SPEC, "run", "run/0/0")
    with pytest.raises(OSError, match="ends here"):
        weights.load(Failing(tensors(1)), "run/0/1")
    assert weights.held is None
    weights.load(tensors(1), "run/0/1")
    assert weights.held == "run/0/1" and same(dump(weights.model), dump(loaded(1)))


def test_a_moved_weight_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    model = loaded(0)
    weights = Weights(model, SPEC, "run", "run/0/0")
    weights.stage(stage(weights, tmp_path, 0, 1), "run/0/1", "run/0/0")
    before = dump(model)
    model.qk.data = model.qk.data.clone()
    with pytest.raises(ValueError, match="qk is not where it was"):
        weights.commit("run/0/1", "run/0/0")
    assert same(before, dump(model)) and weights.held == "run/0/0"


def test_what_another_loader_wrote_is_adopted_and_audited(tmp_path: Path) -> None:
    model = loaded(0)
    weights = Weights(model, SPEC, "run", "run/0/0")
    model.load_weights(tensors(1))
    assert weights.audit()[1], "nobody said that it would change"
    weights.adopt("run/0/1")
    assert weights.held == "run/0/1" and not weights.audit()[1]
    expected = Weights(loaded(1), SPEC, "run").audit()[0]
    assert (weights.audit()[0] == expected).all()


class Rank:
    """Commands and messages as SGLang and the host agent give them."""

    def __init__(self, folder: Path) -> None:
        self.inside = InserverRank()
        self.folder = folder
        (folder / "model.json").write_text(SPEC.to_json())

    def run(self, model: Any, number: int, op: str, **fields: Any) -> dict[str, Any]:
        self.inside.command(model, [(command(op, id="this", **fields), torch.empty(0))])
        return self.inside.message({"op": "result", "of": "this", "model": number})

    def learn(self, model: Any, number: int, **fields: Any) -> dict[str, Any]:
        socket, spec = str(self.folder / "door"), str(self.folder / "model.json")
        return self.run(model, number, "learn", socket=socket, spec=spec, run_id="run", **fields)


def test_a_draft_model_is_learned_beside_its_target(tmp_path: Path) -> None:
    """It shares the target's embedding, which is the target's to write and to hash."""
    rank, target, draft = Rank(tmp_path), loaded(0), loaded(0)
    draft.embed = draft.head = target.embed
    for number, model in enumerate((target, draft)):
        assert rank.learn(model, number, held="run/0/0")["ok"]
    weights = list(rank.inside._models.values())
    assert rank.inside.message({"op": "describe", "model": 1})["models"] == 2
    for number, model in enumerate((target, draft)):
        path = stage(weights[number], tmp_path, 0, 1)
        assert rank.inside.message({"op": "stage", "path": path, "version": "run/0/1", "parent": "run/0/0", "model": number})["ok"]
        reply = rank.run(model, number, "commit", version="run/0/1", parent="run/0/0")
        assert reply["ok"] and reply["held"] == "run/0/1" and not reply["changed"]
    assert same([bits(target.embed)], [bits(loaded(1).embed)]) and not rank.run(draft, 1, "audit")["changed"]
    again = [rank.learn(model, number, held="run/0/1") for number, model in enumerate((target, draft))]
    assert all(reply["ok"] and reply["held"] == "run/0/1" for reply in again)
    assert len(again[0]["moves"]) > len(again[1]["moves"]), "the target's answer is the target's"


def test_nothing_raises_into_sglang(tmp_path: Path) -> None:
    rank, model = Rank(tmp_path), loaded(0)

    class Angry:
        def load_weights(self, weights: Any) -> None:
            raise KeyboardInterrupt

    for names in (
        [],
        ["x"],
        ["{"],
        ["[1]"],
        ['{"op":"commit"}'],
        ['{"op":"audit"}'] * 2,
        [command("learn", socket="/nowhere/x", spec="/", run_id="r")],
    ):
        rank.inside.command(model, [(name, torch.empty(0)) for name in names])
    rank.inside.command(Angry(), [(command("audit"), torch.empty(0))])
    rank.inside.command(model, None)  # type: ignore[arg-type]
    assert "learn comes first" in rank.run(model, 0, "audit")["error"]
    reply = rank.run(model, 0, "learn", socket="/nowhere/x", spec=str(tmp_path / "model.json"), run_id="run")
    assert not reply["ok"] and "No such file" in reply["error"]
    Rank(tmp_path).learn(model, 0)
    rank.learn(model, 0)
    assert rank.run(Angry(), 1, "learn", socket=str(tmp_path / "door"), spec="/", run_id="run")["error"]
    save_file({"q": torch.zeros(3)}, tmp_path / "bad.safetensors")
    assert "no tensor of the model" in rank.run(model, 0, "load", path=str(tmp_path / "bad.safetensors"))["error"]
