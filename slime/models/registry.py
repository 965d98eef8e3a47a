"""From a model's directory to its map."""

import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from slime.config.model import ModelConfig
from slime.layout import Shape
from slime.models import families
from slime.models.config_json import ConfigJson
from slime.models.decoder import Family
from slime.models.hf_headers import HFHeaders
from slime.models.map import ModelMap
from slime.models.parts.feed_forward import Experts

FAMILIES: dict[str, Family] = {
    found.name: import_module(f"{families.__name__}.{found.name}").FAMILY for found in pkgutil.iter_modules(families.__path__)
}
# model_type -> why megatron-core's layers, as slime builds them, cannot compute the model.
REFUSED = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), "its linear attention (gated delta net)"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "its sparse attention (the lightning indexer)"),
    "deepseek_v4": "its compressed attention",
    "gpt_oss": "its attention sinks",
}


def load_map(path: str | Path, family: str = "auto", tp_size: int = 1) -> ModelMap:
    """The map of the Hugging Face model in directory `path`, checked against the names and shapes of its safetensors (headers only).

    `family` auto reads model_type and architectures from config.json; a family's name is taken at its word. `tp_size` decides the
    padding of the vocabulary. Raises ValueError naming the file and the field or tensor: no such directory, unknown family, a config
    field the family does not know or a value it cannot express, a tensor that is missing, unexpected or of another shape, a tp_size
    that does not divide the model.
    """
    path = Path(path)
    model = read_map(path, family, tp_size)
    with HFHeaders(path) as reader:
        found = {name: reader.shape(name) for name in reader.names}
    kept = {name: shape for name, shape in found.items() if _matches(name, model.kept)}
    check_shapes(path, model.hf_shapes, found, (*model.spare, *model.kept))
    return replace(model, kept_shapes=kept)


def read_map(path: Path, family: str = "auto", tp_size: int = 1) -> ModelMap:
    """The map by config.json alone. Raises ValueError like `load_map`, but for tensors."""
    if not path.is_dir():
        raise ValueError(f"model.path={path}: no such directory; give the directory of a Hugging Face model")
    config = ConfigJson(path)
    return _family(config, family).build(config, tp_size)


def has_experts(model: ModelConfig) -> bool:
    """Whether the model of a recipe is a mixture of experts; False for one that is not on this host yet, or of no family."""
    path = Path(model.path)
    if not path.is_dir():
        return False
    family = FAMILIES.get(str(ConfigJson(path).raw("model_type")) if model.family == "auto" else model.family)
    return family is not None and isinstance(family.feed_forward, Experts)


def check_shapes(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape], spare: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless the tensors of a checkpoint are exactly the expected ones; those that match a pattern of `spare` may be
    there too."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{path}: its safetensors lack {_some(missing)}, which its config.json calls for")
    surplus = [name for name in found if name not in expected and not _matches(name, spare)]
    if surplus:
        raise ValueError(f"{path}: its safetensors hold {_some(surplus)}, for which the map of its family has no place")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{path}: {name} has shape {list(found[name])}, its config.json calls for {list(shape)}")


def _family(config: ConfigJson, name: str) -> Family:
    model_type = str(config.raw("model_type"))
    chosen = FAMILIES.get(model_type if name == "auto" else name)
    known = ", ".join(sorted(FAMILIES))
    if chosen is None and name != "auto":
        raise ValueError(f"model.family={name}: no such family; known are auto, {known}")
    if chosen is None and model_type in REFUSED:
        raise config.error("model_type", f"megatron-core's layers cannot compute {REFUSED[model_type]}; families that can: {known}")
    if chosen is None:
        raise config.error("model_type", f"no family has this type (known: {known}); model.family names one by hand")
    architectures = config.raw("architectures")
    if name == "auto" and architectures and architectures != [chosen.architecture]:
        raise config.error("architectures", f"model.family={chosen.name} maps {chosen.architecture} only")
    return chosen


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    """The first few of a list of names, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
