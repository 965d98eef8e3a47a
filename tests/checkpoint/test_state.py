"""What the driver knows of itself comes back as it was, and only from a file of the same form."""

import json
from pathlib import Path

import pytest

from slime.checkpoint.manifest import InvalidCheckpoint
from slime.checkpoint.origin import KnownFile, Origin
from slime.checkpoint.state import FORM, NAME, DriverState, read_state, write_state
from slime.types import WeightVersion

STATE = DriverState(
    step=3,
    version=WeightVersion(1, 3, "abc"),
    ledger={"next": 9},
    trackers={"wandb": "x"},
    config={"trainer": {"lr": 1e-6}},
    wall_s=2.5,
    origin=Origin({"torch": "2.6"}, [KnownFile("a.jsonl", 3, "aa")]),
)


def test_it_comes_back(tmp_path: Path):
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE


@pytest.mark.parametrize("form", [None, FORM - 1, FORM + 1])
def test_another_form_is_refused_by_name(tmp_path: Path, form: int | None):
    """Also where its fields would fit."""
    write_state(tmp_path, STATE)
    fields = json.loads((tmp_path / NAME).read_text())
    del fields["form"]
    (tmp_path / NAME).write_text(json.dumps(fields if form is None else {"form": form, **fields}))
    with pytest.raises(InvalidCheckpoint, match=rf"its state\.json has form {form or 1}, this version of slime reads {FORM}"):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"form": 2}', '{"form": 2, "step": 1, "version": {}}'])
def test_damage_is_named(tmp_path: Path, text: str):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InvalidCheckpoint, match=r"its state\.json (cannot be read|has form 1)"):
        read_state(tmp_path)
