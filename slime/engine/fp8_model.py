"""The model directory that FP8 servers start from: config.json that says so, links to all the rest, and no weights.

SGLang fills the parameters with anything (`--load-format dummy`); the host agent then loads the codes and scales of the committed version
and proves them, as with any engine that holds other weights, before the first request.
"""

import hashlib
import json
import uuid
from pathlib import Path

from slime.config.check_fp8 import BLOCK
from slime.engine.arguments import cache_dir

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
WEIGHTS = (".safetensors", ".bin", ".pt", ".safetensors.index.json")


def fp8_model_dir(model: Path) -> Path:
    """A directory for this model; made where it is not there yet. Raises ValueError for a model that is quantised already."""
    config = json.loads((model / "config.json").read_text())
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"model.path={model} is quantised already ({method}): give the bf16 model")
    text = json.dumps(config | {"quantization_config": CONFIG}, indent=1)
    folder = cache_dir() / "fp8" / hashlib.sha256(f"{model.resolve()}\n{text}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.resolve().iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHTS):
            _link(folder / path.name, path)
    partial = folder / f".{uuid.uuid4().hex}"
    partial.write_text(text)
    partial.replace(folder / "config.json")
    return folder


def _link(link: Path, target: Path) -> None:
    partial = link.with_name(f".{uuid.uuid4().hex}")
    partial.symlink_to(target)
    partial.replace(link)
