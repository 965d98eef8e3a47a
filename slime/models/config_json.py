"""Reading config.json so that no field goes unnoticed: each is read, allowed one value, or known to be without effect."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Fields of any transformers config that do not change what a causal language model computes from its weights.
WITHOUT_EFFECT = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_return_dict",
)


class ConfigJson:
    """The fields of one config.json; remembers which were looked at. Every error names the file and the field."""

    def __init__(self, path: Path) -> None:
        """`path` is the model's directory. Raises ValueError where config.json is missing or not a JSON object."""
        self.path = path / "config.json"
        try:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"model.path={path}: no config.json there; give the directory of a Hugging Face model") from None
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from None
        if not isinstance(self.values, dict):
            raise ValueError(f"{self.path}: expected a JSON object, found {type(self.values).__name__}")
        self._seen: set[str] = set(WITHOUT_EFFECT)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; `default` where the field is absent or null, which without one raises ValueError."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "a positive whole number is needed")
        return value

    def whole(self, name: str, default: int) -> int:
        """A whole number, 0 or larger; `default` where the field is absent or null."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(name, "a whole number is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; `default` as for `integer`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(name, "a positive number is needed")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false is needed")
        return value

    def spelled(self, *names: str) -> str:
        """The one of several spellings of a field that is there; the first where none is. Raises ValueError where two contradict."""
        self._seen.update(names)
        there = [name for name in names if self.values.get(name) is not None]
        for name in there[1:]:
            if self.values[name] != self.values[there[0]]:
                raise self.error(name, f"contradicts {there[0]}; keep one of them")
        return there[0] if there else names[0]

    def raw(self, name: str) -> Any:
        """The value as read, None where the field is absent."""
        self._seen.add(name)
        return self.values.get(name)

    def only(self, name: str, allowed: Iterable[Any], why: str) -> None:
        """Raises ValueError unless the field is absent, null, or one of `allowed`."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            raise self.error(name, why)

    def ignore(self, *names: str) -> None:
        """These fields are without effect."""
        self._seen.update(names)

    def finish(self, family: str) -> None:
        """Raises ValueError naming every field that was not looked at."""
        unknown = sorted(name for name in self.values if name not in self._seen)
        if unknown:
            raise ValueError(
                f"{self.path}: the map of model.family={family} does not understand the field(s) {', '.join(unknown)}; "
                "remove what does not change the model's mathematics, or add it to the map in slime/models"
            )

    def error(self, name: str, why: str) -> ValueError:
        """A ValueError about a field's value."""
        return ValueError(f"{self.path}: {name}={json.dumps(self.values.get(name))}: {why}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise ValueError(f"{self.path}: the field {name} is missing")
        return default if value is None else value
