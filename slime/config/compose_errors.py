"""What Hydra and OmegaConf say about a recipe, said in the recipe's own words: the value, the place, the mend."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path

import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.tree import Knob, knobs, nearest, type_of, type_words, unknown_key


@contextmanager
def explained(config_name: str, folders: list[Path]) -> Iterator[None]:
    """Turn what composing raises into ConfigError. `folders` hold the recipes that could have been meant."""
    try:
        yield
    except MissingConfigException as error:
        raise _no_recipe(error, config_name, folders) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {config_name}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ConfigCompositionException, OmegaConfBaseException) as error:
        raise _said(error) from error


def _no_recipe(error: MissingConfigException, config_name: str, folders: list[Path]) -> ConfigError:
    missing = error.missing_cfg_file if isinstance(error.missing_cfg_file, str) else config_name
    recipes = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    named_by = "" if missing == config_name else f", which recipe {config_name} names in its defaults"
    return ConfigError(f"no recipe {missing}{named_by}; there are {', '.join(recipes)}{nearest(missing, recipes)}")


def _said(error: Exception) -> ConfigError:
    """The OmegaConf error below Hydra's, in words."""
    place = _place(error)
    below: BaseException | None = error
    while below is not None and not isinstance(below, OmegaConfBaseException):
        below = below.__cause__ or below.__context__
    if below is None or not below.full_key:
        return ConfigError(_hydras(" ".join(str(error).split())))
    key = str(below.full_key)
    if isinstance(below, MissingMandatoryValue):
        return ConfigError(f"{key} is required: {_knob(key).doc}")
    if isinstance(below, InterpolationResolutionError):
        return ConfigError(f"{key}{place}: {str(below.msg).splitlines()[0]}")
    if isinstance(below, ConfigKeyError):
        return _unknown(below, key, place)
    if isinstance(below, ValidationError):
        return _wrong_value(below, key, place)
    return ConfigError(f"{key}{place}: {below.msg}")


def _hydras(text: str) -> str:
    """Hydra's own words, without its advice to write `+`."""
    if group := re.match(r"Could not override '([^']+)'\. No match in the defaults list\..*?use \+(\S+)", text):
        named, _, option = group[2].partition("=")
        chosen = f"`{named}: {option}`"
        return f"{group[2]}: the recipe chooses no {group[1]}, so there is nothing to override; put {chosen} in its defaults, before _self_"
    if gone := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
        return f"~{gone[1]}: there is no {gone[1]} to remove"
    return re.sub(r"\s*To append to your \S+(?: \S+)? use \+\S+", "", text)


def _place(error: Exception) -> str:
    """' (recipe x)' for what stands in a file; the command line goes without saying."""
    found = re.match(r"In '([^']+)'", str(error))
    return f" (recipe {found[1]})" if found else ""


def _unknown(error: OmegaConfBaseException, key: str, place: str) -> ConfigError:
    """A key that its group does not have. Inside a list or dictionary OmegaConf gives the key alone, and its class."""
    if "." not in key and is_dataclass(error.object_type) and error.object_type is not SlimeConfig:
        groups = (_as_key(knob.path).rpartition(".")[0] for knob in knobs())
        key = next(group for group in groups if type_of(group) is error.object_type) + "." + key
    return unknown_key(key.replace("[", ".").replace("]", ""), key.count("."), place)


def _wrong_value(error: OmegaConfBaseException, key: str, place: str) -> ConfigError:
    """A value of the wrong type, or null where a value is needed."""
    given = "null" if str(error.value) == "None" else error.value
    if beyond := re.fullmatch(r"(.*)\[\d+\]", key):
        if isinstance(error.value, str):
            item = f"{{path: {given}}}"
            return ConfigError(f"{key}={given}{place}: an item is {item}, as in {beyond[1]}=[{item}]")
        return ConfigError(f"{key}{place}: {beyond[1]} has no such item; give the whole list: {beyond[1]}=[{{path: ...}}, ...]")
    knob = next((knob for knob in knobs() if _as_key(knob.path, key) == key), None)
    if knob is None:
        return ConfigError(f"{key}={given}{place}: takes {type_words(type_of(key))}")
    return ConfigError(f"{key}={given}{place}: takes {knob.values}. {knob.doc}")


def _knob(key: str) -> Knob:
    return next(knob for knob in knobs() if _as_key(knob.path, key) == key)


def _as_key(path: str, like: str = "") -> str:
    """A documented path as a key: free steps taken from `like` where that is as deep, else 0."""
    steps = like.replace("[", ".").replace("]", "").split(".")
    return ".".join((steps[at] if at < len(steps) else "0") if step.startswith("<") else step for at, step in enumerate(path.split(".")))
