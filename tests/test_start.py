"""What a recipe's paths become before anything is started."""

from pathlib import Path

import pytest

from slime.config import DataConfig, DataFile, EvalSet, ModelConfig, SlimeConfig
from slime.start import on_disk


def test_paths_become_absolute_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "warm").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    data = DataConfig(train=[DataFile("a.jsonl", 2.0)], eval={"e": EvalSet("e.jsonl", samples=3)})
    found = on_disk(SlimeConfig(model=ModelConfig("warm"), data=data))
    assert found.model.path == str(tmp_path / "model")
    assert found.data.train == [DataFile(str(tmp_path / "a.jsonl"), 2.0)]
    assert found.data.eval == {"e": EvalSet(str(tmp_path / "e.jsonl"), samples=3)}


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match=r"model\.path=no/where/at/all: no such directory, and not a hub id"):
        on_disk(SlimeConfig(model=ModelConfig("no/where/at/all")))
