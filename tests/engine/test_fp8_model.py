"""The directory that FP8 servers start from."""

import json
from pathlib import Path

import pytest

from slime.engine.fp8_model import fp8_model_dir
from tests.tiny import make_tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_holds_everything_but_weights(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16")
    made = fp8_model_dir(model)
    assert made == fp8_model_dir(model)
    names = {path.name for path in made.iterdir()}
    assert names == {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert json.loads((made / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    assert all((made / name).read_bytes() == (model / name).read_bytes() for name in names - {"config.json"})


def test_another_config_is_another_directory(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16")
    before = fp8_model_dir(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    assert fp8_model_dir(model) != before


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match=r"is quantised already \(awq\): give the bf16 model"):
        fp8_model_dir(model)
