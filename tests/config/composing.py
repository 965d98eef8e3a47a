"""Recipes composed in a fraction of the time, for tests that ask what is made of a recipe and not how Hydra reads its files."""

import copy
from functools import cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from slime.config import SlimeConfig
from slime.config.compose_errors import explained
from slime.config.load import compose_tree, finish
from slime.config.overrides import RECIPES, prepare_override


@cache
def _base() -> DictConfig:
    composed, _ = compose_tree("base", [], None)
    return composed


def composed(*overrides: str) -> SlimeConfig:
    """What `compose(overrides=overrides).cfg` is, and raises: Hydra reads base.yaml and its own settings once in a process, and each
    call takes a copy, to which Hydra's own function applies the overrides. test_composing.py compares the two."""
    plain = [prepare_override(text, [RECIPES]) for text in overrides]
    tree = copy.deepcopy(_base())
    with explained("base", [RECIPES]):
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(plain), tree)
    return finish(tree, "base", plain).cfg
