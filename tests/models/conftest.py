"""Tiny checkpoints of every family, made once a session, and copies of them with something changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.models.parts.attention import Latent
from slime.models.registry import FAMILIES
from tests.tiny import make_tiny

Change = Callable[[dict[str, torch.Tensor]], object]
# A vocabulary of 77 is padded to 80; 8 heads of size 8 are wider than the hidden size; everything splits over TP 4. Two layers, of which
# the first is dense in a sparse model.
SIZES: dict[str, Any] = {"vocab": 77, "hidden": 32, "heads": 8, "kv_heads": 4, "head_dim": 8}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, tied, dtype)` is the directory of such a model; the same one each time, not to be changed."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def make(family: str, tied: bool = False, dtype: str = "fp32") -> Path:
        key = f"{family}-{tied}-{dtype}"
        if key not in made:
            heads = {"num_key_value_heads": SIZES["heads"]} if isinstance(FAMILIES[family].attention, Latent) else {}
            made[key] = make_tiny(root / key, family, tied, dtype=dtype, seed=len(made), **SIZES, **heads)
        return made[key]

    return make


@pytest.fixture
def changed(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed(family, tensors, **fields)` is a copy of `tiny(family)` with other fields in config.json (... removes one) and, with
    `tensors`, a function that changes the dict of tensors."""

    def make(family: str = "qwen3", tensors: Change | None = None, **fields: Any) -> Path:
        source = tiny(family)
        config = json.loads((source / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        if tensors is None:
            (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
            return tmp_path
        weights = load_file(source / "model.safetensors")
        tensors(weights)
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return make
