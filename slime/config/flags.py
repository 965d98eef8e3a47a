"""The flags of `slime train`, which are Hydra's: what is not one of them is answered with what was meant."""

import argparse
import difflib
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from slime.config.exits import ConfigError
from slime.config.tree import elsewhere, knobs

RECIPE_WORDS = ("recipe", "config", "config_file", "configname", "name")  # what people write for --config-name


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides among them. Raises ConfigError for what is neither."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    for word in argv:
        flag = word.partition("=")[0]
        known = any(option.startswith(flag) for option in options) and flag not in ("--config", "--conf")  # Hydra takes beginnings of flags
        if flag.startswith("--") and not known:
            raise ConfigError(_unknown_flag(word, options))
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such flag; `slime train --help` lists flags and knobs")
    if given.config_path:
        raise ConfigError(f"--config-path {given.config_path}: use --config-dir, which adds a folder of recipes to slime's own")
    return given


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; `slime train --help` shows how it is called")


def _unknown_flag(word: str, options: list[str]) -> str:
    """What was meant: a recipe, a knob, or another spelling of a flag."""
    flag, _, value = word.partition("=")
    key = flag.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(flag.replace("_", "-"), options, 1, 0.8)
    if key in RECIPE_WORDS or near == ["--config-name"]:
        return f"{flag}: no such flag; a recipe is named by --config-name"
    if near:
        return f"{flag}: no such flag; did you mean {near[0]}?"
    known = {knob.path for knob in knobs()}
    meant = [knob for knob in knobs() if knob.path in ({key} if key in known else elsewhere(key))]
    if meant:
        written = " or ".join(f"{knob.path}={value or ('true' if knob.type is bool else '...')}" for knob in meant[:3])
        return f"{flag}: no such flag; a knob is set by key=value, {written}"
    return f"{flag}: no such flag; `slime train --help` lists flags and knobs, and a knob is set by key=value"
