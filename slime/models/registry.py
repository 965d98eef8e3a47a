"""From a model's directory to its map."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from slime.layout import Shape
from slime.models.config_json import ConfigJson
from slime.models.dense import DenseFamily
from slime.models.hf_headers import HFHeaders
from slime.models.llama import LLAMA
from slime.models.map import ModelMap
from slime.models.qwen3 import QWEN3

FAMILIES = {family.name: family for family in (LLAMA, QWEN3)}


def load_map(path: str | Path, family: str = "auto", tp_size: int = 1) -> ModelMap:
    """The map of the Hugging Face model in directory `path`, checked against the names and shapes of its safetensors (headers only).

    `family` auto reads model_type and architectures from config.json; a family's name is taken at its word. `tp_size` decides the
    padding of the vocabulary. Raises ValueError naming the file and the field or tensor: no such directory, unknown family, a config
    field the family does not know or a value it cannot express, a tensor that is missing, unexpected or of another shape, a tp_size
    that does not divide the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"model.path={path}: no such directory; give the directory of a Hugging Face model")
    config = ConfigJson(path)
    chosen = _family(config, family)
    model = chosen.build(config, tp_size)
    tied = ("lm_head.weight",) if model.gpt["share_embeddings_and_output_weights"] else ()
    with HFHeaders(path) as reader:
        check_shapes(path, model.hf_shapes, {name: reader.shape(name) for name in reader.names}, (*chosen.spare_tensors, *tied))
    return model


def check_shapes(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape], spare: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless the tensors of a checkpoint are exactly the expected ones; those that match a pattern of `spare` may be
    there too."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{path}: its safetensors lack {_some(missing)}, which its config.json calls for")
    surplus = [name for name in found if name not in expected and not any(fnmatchcase(name, pattern) for pattern in spare)]
    if surplus:
        raise ValueError(f"{path}: its safetensors hold {_some(surplus)}, for which the map of its family has no place")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{path}: {name} has shape {list(found[name])}, its config.json calls for {list(shape)}")


def _family(config: ConfigJson, name: str) -> DenseFamily:
    model_type = config.raw("model_type")
    chosen = FAMILIES.get(str(model_type) if name == "auto" else name)
    known = ", ".join(sorted(FAMILIES))
    if chosen is None and name != "auto":
        raise ValueError(f"model.family={name}: no such family; known are auto, {known}")
    if chosen is None:
        raise config.error("model_type", f"no family has this type (known: {known}); model.family names one by hand")
    architectures = config.raw("architectures")
    if name == "auto" and architectures and architectures != [chosen.architecture]:
        raise config.error("architectures", f"model.family={chosen.name} maps {chosen.architecture} only")
    return chosen


def _some(names: list[str]) -> str:
    """The first few of a list of names, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
