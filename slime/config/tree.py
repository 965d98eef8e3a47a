"""The tree of knobs, read off the dataclasses: what a dotted key may be, and what stands there.

A key's steps are fields, names in an open dictionary (`rollout.sglang.<any field>`, `data.eval.<name>.path`) or positions in a list
(`data.train.0.path`).
"""

import dataclasses
import difflib
import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from slime.config import SlimeConfig
from slime.config.docs import documentation
from slime.config.exits import ConfigError

# How a free step is written in the docs.
STEP_NAMES = {"algorithm.teachers": "name", "cluster.roles": "role", "data.eval": "name", "data.train": "n"}


@dataclass(frozen=True)
class Knob:
    """One knob. `path` has <name> for a free step."""

    path: str
    type: Any
    default: Any
    doc: str
    metadata: Any  # of the dataclass field: choices, or low, high, above, below

    @property
    def values(self) -> str:
        """The values it takes, in words."""
        if "choices" in self.metadata:
            return " | ".join(self.metadata["choices"])
        bounds = [
            f"{sign} {figure(self.metadata[key])}"
            for key, sign in (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
            if self.metadata.get(key) is not None
        ]
        return ", ".join([type_words(self.type), *bounds])


def figure(value: float) -> str:
    """A number as a recipe would write it: whole ones in full."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def type_words(hint: Any) -> str:
    """A type in a user's words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_words(each) for each in get_args(hint))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return words.get(hint, {list: "a list", dict: "a dictionary"}.get(get_origin(hint), "a group of knobs"))


def is_open(hint: Any) -> bool:
    """A dictionary whose keys another library knows."""
    return get_origin(hint) is dict and get_args(hint)[1] is Any


def element(hint: Any) -> Any:
    """Type of the values of a list or dictionary; None for other types."""
    return get_args(hint)[-1] if get_origin(hint) in (list, dict) else None


@cache
def knobs(group: type = SlimeConfig, prefix: str = "") -> tuple[Knob, ...]:
    """Every knob of a dataclass tree, in the order of the files."""
    hints, docs = get_type_hints(group), documentation(group)
    found: list[Knob] = []
    for field in dataclasses.fields(group):
        path, hint = prefix + field.name, hints[field.name]
        inner = element(hint) if dataclasses.is_dataclass(element(hint)) else None
        if dataclasses.is_dataclass(hint):
            found += knobs(hint, path + ".")  # type: ignore[arg-type]
        elif inner is not None:
            found += knobs(inner, f"{path}.<{STEP_NAMES[path]}>.")
        else:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            found.append(Knob(path, hint, default, docs[field.name], field.metadata))
    return tuple(found)


def type_of(key: str) -> Any:
    """The type that stands at a dotted key (a dataclass for a group of knobs; Any below an open dictionary).

    Raises ConfigError with the nearest legal names for a key that does not exist.
    """
    hint: Any = SlimeConfig
    steps = key.replace("[", ".").replace("]", "").split(".")
    for at, step in enumerate(steps):
        if is_open(hint):
            return Any
        before = ".".join(steps[:at])
        if dataclasses.is_dataclass(hint):
            hints = get_type_hints(hint)
            if step not in hints:
                raise unknown_key(key, at)
            hint = hints[step]
        elif (get_origin(hint) is dict and step) or (get_origin(hint) is list and step.isdigit()):
            hint = element(hint)
        elif get_origin(hint) is list:
            raise ConfigError(f"{key}: {before} is a list; its items are {before}.0, {before}.1, ...")
        else:
            raise ConfigError(f"{key}: {before} is {type_words(hint)} and has nothing below it")
    return hint


def unknown_key(key: str, at: int, place: str = "") -> ConfigError:
    """The error for a key whose step number `at` is not a field: it names the nearest legal keys. `place` says where it was read."""
    steps = key.split(".")
    known = ".".join(steps[:at])
    siblings = list(get_type_hints(type_of(known) if known else SlimeConfig))
    close = [".".join([*steps[:at], name, *steps[at + 1 :]]) for name in difflib.get_close_matches(steps[at], siblings, 3, 0.6)]
    close = [name for name in close if _exists(name)] or elsewhere(key)
    return ConfigError(f"unknown key {key}{place}: " + did_you_mean(close, f"{known or 'a recipe'} has {', '.join(siblings)}"))


def did_you_mean(names: list[str], otherwise: str) -> str:
    """'did you mean a or b?', or the fallback where nothing is near."""
    return f"did you mean {' or '.join(names[:3])}?" if names else otherwise


def nearest(value: str, legal: list[str] | tuple[str, ...]) -> str:
    """'; did you mean x?' where a legal value is a near spelling, else nothing. A slip seldom hits the first letter: async is not sync."""
    lower = {name.lower(): name for name in legal}
    same_start = [name for name in lower if name[:1] == value[:1].lower()]
    close = [lower[name] for name in difflib.get_close_matches(value.lower(), same_start, 1, 0.7)]
    return f"; did you mean {close[0]}?" if close else ""


def _exists(key: str) -> bool:
    try:
        type_of(key)
    except ConfigError:
        return False
    return True


def elsewhere(key: str) -> list[str]:
    """Knobs of the same or a similar last name in other groups."""
    last = key.rpartition(".")[2]
    names: dict[str, list[str]] = {}
    for knob in knobs():
        names.setdefault(knob.path.rpartition(".")[2], []).append(knob.path)
    return [path for name in difflib.get_close_matches(last, list(names), 2, 0.75) for path in names[name]]
