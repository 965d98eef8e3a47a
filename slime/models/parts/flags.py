"""A choice that a family fixes, or that a field of config.json makes."""

from dataclasses import dataclass

from slime.models.config_json import ConfigJson


@dataclass(frozen=True)
class Flag:
    """A true-or-false field of config.json and its value where the field is absent."""

    field: str
    default: bool


def decide(choice: bool | Flag, config: ConfigJson) -> bool:
    """The choice for one model."""
    return config.flag(choice.field, choice.default) if isinstance(choice, Flag) else choice
