"""Overrides on the command line, checked and made plain before Hydra answers.

Hydra's grammar stays as it is. Every key is looked up in the tree of knobs; where Hydra would ask for `+` or `++` (a field of an open
dictionary, a first evaluation set), the prefix is written here, so that a user never types one.
"""

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from slime.config.exits import ConfigError
from slime.config.flags import parse_flags
from slime.config.recipes import RECIPES, recipe_folders
from slime.config.tree import STEP_NAMES, did_you_mean, element, is_open, knobs, nearest, type_of

__all__ = ["RECIPES", "prepare", "prepare_override", "recipe_folders"]


def prepare(argv: list[str]) -> list[str]:
    """The arguments for Hydra: its flags, then the overrides, each checked and prefixed. Raises ConfigError for one that names no knob."""
    given = parse_flags(argv)
    folders = recipe_folders(given.config_dir)
    flags = [argument for argument in argv if argument not in given.overrides]
    return [*flags, *(prepare_override(text, folders) for text in given.overrides)]


def prepare_override(text: str, folders: list[Path]) -> str:
    """One override for Hydra. `folders` hold the recipes and their groups (model/, algorithm/, ...)."""
    text = without_slash(expand_home(text))
    override = _parse(text)
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")) or override.package is not None:
        return text
    bare = text.lstrip("+~")
    options = [option for folder in folders for option in sorted(path.stem for path in (folder / key).glob("*.yaml"))]
    if options:
        return _group(override, text, options)
    hint = type_of(key)
    if override.type is OverrideType.DEL:
        parent = key.rpartition(".")[0]
        if element(type_of(parent) if parent else None) is None:
            raise ConfigError(f"{text}: {_instead(key, hint)}")
        return text
    if is_dataclass(hint) and not isinstance(override.value(), dict):
        names = [knob.path for knob in knobs() if knob.path.startswith(key + ".")]
        raise ConfigError(f"{text}: {key} is a group of knobs; set one of {', '.join(names) or _members(key)}")
    if get_origin(hint) is dict and override.value() == {}:
        raise ConfigError(f"{text}: dictionaries are merged, so an empty one changes nothing; remove a name with '~{key}.<name>'")
    return _into_dictionary(bare, override.is_sweep_override())


def expand_home(text: str) -> str:
    """The override with ~/ at the beginning of a path written out: Hydra's grammar has no ~, and the shell leaves it alone after `=`."""
    if not re.match(r"\+*(data|model|run|algorithm\.teachers|rollout\.engine_python)\b", text):
        return text
    return re.sub(r"(=|,|: )(['\"]?)~/", lambda found: f"{found[1]}{found[2]}{Path.home()}/", text)


def without_slash(text: str) -> str:
    """The override of a role whose name has a slash, written out: Hydra's grammar takes it in a value alone."""
    return re.sub(r"^\+*cluster\.roles\.([\w-]+/[\w-]+)\.(\w+)=(.*)$", r"cluster.roles={\1: {\2: \3}}", text)


def _instead(key: str, hint: Any) -> str:
    """What can be done where a knob or a group cannot be removed."""
    if is_dataclass(hint):
        return "a group of knobs cannot be removed; set its knobs"
    if get_origin(hint) is dict:
        return f"a dictionary cannot be removed; remove a name with '~{key}.<name>'"
    other = f"{key}=[]" if get_origin(hint) is list else f"{key}=null" if type(None) in get_args(hint) else "another value"
    return f"a knob cannot be removed; set {other if '=' in other else 'it to ' + other}"


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(f"{text}: not key=value; the recipe's name goes to --config-name") from error
        key, _, value = text.partition("=")
        if "[" in key:
            raise ConfigError(
                f"{text}: a position in a list is written with a dot: {key.replace('[', '.').replace(']', '')}={value}"
            ) from error
        raise ConfigError(
            f"{text}: Hydra cannot read the value; quote it twice, once for the shell and once for Hydra: '{key}=\"{value}\"'"
        ) from error


def _group(override: Override, text: str, options: list[str]) -> str:
    """An override that chooses a file of a config group, such as model=qwen3."""
    value = override.value()
    if isinstance(value, str) and not override.is_sweep_override() and value not in options:
        raise ConfigError(f"{text}: group {override.key_or_group} has {', '.join(options)}{nearest(value, options)}")
    return text


def _into_dictionary(text: str, sweep: bool) -> str:
    """The override in a form that Hydra takes where some step of the key is a name in a dictionary.

    Open dictionaries take `++`. A name in a dictionary of groups may not exist yet, and only a merge makes a typed group of it:
    data.eval.x.path=p becomes ++data.eval={x: {path: p}}, which leaves the other names alone. A sweep's names exist already.
    """
    key, _, value = text.partition("=")
    steps = key.split(".")
    for at in range(1, len(steps) + 1):
        hint = type_of(".".join(steps[:at]))
        if is_open(hint) or (get_origin(hint) is dict and sweep):
            return f"++{text}"
        if get_origin(hint) is dict:
            return f"++{'.'.join(steps[:at])}=" + "".join(f"{{{step}: " for step in steps[at:]) + value + "}" * len(steps[at:])
    return text


def _members(key: str) -> str:
    """The knobs of a group that stands below a free name, such as data.eval.heldout."""
    parent, _, name = key.rpartition(".")
    written = f"{parent}.<{STEP_NAMES[parent]}>." if parent in STEP_NAMES else key
    return ", ".join(knob.path.replace(written, f"{parent}.{name}.") for knob in knobs() if knob.path.startswith(written)) or did_you_mean(
        [], key
    )
