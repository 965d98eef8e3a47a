"""From a recipe's name and overrides to a `SlimeConfig`, by Hydra. The command line and the tests come through here."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from slime.config import SlimeConfig
from slime.config.compose_errors import explained
from slime.config.overrides import RECIPES, prepare_override, recipe_folders

VERSION_BASE = "1.3"  # of Hydra's behaviour
# Overrides that leave the run the same run.
UNNAMED = ("run.name", "run.dir", "run.resume", "run.dry_run", "run.steps", "run.save_every", "run.keep_last", "run.grace_s")

ConfigStore.instance().store(name="slime_schema", node=SlimeConfig)


@dataclass(frozen=True)
class Recipe:
    """A composed recipe. `overrides_hash` is empty where nothing was overridden; `cfg.run.name` is always set."""

    cfg: SlimeConfig
    resolved: str  # yaml of the whole config
    name: str
    overrides_hash: str


def compose(config_name: str = "base", overrides: list[str] | None = None, config_dir: str | Path | None = None) -> Recipe:
    """Compose a recipe from recipes/ or `config_dir`, with overrides as on the command line. Raises ConfigError."""
    folders = recipe_folders(config_dir)
    plain = [prepare_override(text, folders) for text in overrides or []]
    search_path = create_config_search_path(str(RECIPES))
    if config_dir:
        search_path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    version.setbase(VERSION_BASE)
    with explained(config_name, folders):
        Hydra.create_main_hydra2("slime", search_path)
        try:
            composed = hydra_compose(config_name, plain)
        finally:
            GlobalHydra.instance().clear()
    return finish(composed, config_name, plain)


def finish(composed: DictConfig, config_name: str, overrides: list[str]) -> Recipe:
    """Name the run and turn Hydra's config into dataclasses. Raises ConfigError for a required knob that nothing sets."""
    code = overrides_hash(overrides)
    name = Path(config_name).stem
    if composed.run.name is None:
        composed.run.name = "-".join(filter(None, (name, code)))
    with explained(config_name, [RECIPES]):
        cfg = OmegaConf.to_object(composed)
        resolved = OmegaConf.to_yaml(composed, resolve=True)
    assert isinstance(cfg, SlimeConfig)
    return Recipe(cfg, resolved, name, code)


def overrides_hash(overrides: list[str]) -> str:
    """Eight hexadecimal digits for a set of overrides, in any order; empty where none of them changes what is run."""
    kept = sorted(text.lstrip("+") for text in overrides if text.lstrip("+").partition("=")[0] not in UNNAMED)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8] if kept else ""
