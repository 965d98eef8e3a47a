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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slime.config import SlimeConfig
from slime.config.compose_errors import explained
from slime.config.exits import ConfigError
from slime.config.overrides import prepare_override
from slime.config.recipes import RECIPES, SCHEMA, check_beginning, no_beginning, recipe_folders

VERSION_BASE = "1.3"  # of Hydra's behaviour
# Overrides that leave the run the same run.
UNNAMED = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.dry_run",
    "run.steps",
    "run.save_every",
    "run.keep_last",
    "run.grace_s",
    "run.keep_every",
    "run.max_hours",
    "run.max_restarts",
    "run.accept_changes",
)

ConfigStore.instance().store(name=SCHEMA, node=SlimeConfig)


@dataclass(frozen=True)
class Recipe:
    """A composed recipe. `overrides_hash` is empty where nothing was overridden; `cfg.run.name` is always set."""

    cfg: SlimeConfig
    composed: DictConfig
    name: str
    overrides_hash: str

    @property
    def resolved(self) -> str:
        """yaml of the whole config."""
        return OmegaConf.to_yaml(self.composed, resolve=True)


def compose(config_name: str = "base", overrides: list[str] | None = None, config_dir: str | Path | None = None) -> Recipe:
    """Compose a recipe from recipes/ or `config_dir`, with overrides as on the command line. Raises ConfigError."""
    composed, plain = compose_tree(config_name, overrides or [], config_dir)
    return finish(composed, config_name, plain)


def compose_tree(config_name: str, overrides: list[str], config_dir: str | Path | None) -> tuple[DictConfig, list[str]]:
    """Hydra's config, in which required knobs may be missing, and the overrides that it was made by. Raises ConfigError."""
    folders = recipe_folders(config_dir)
    plain = [prepare_override(text, folders) for text in overrides]
    search_path = create_config_search_path(str(RECIPES))
    if config_dir:
        search_path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    version.setbase(VERSION_BASE)
    check_beginning(config_name, folders)
    with explained(config_name, folders):
        Hydra.create_main_hydra2("slime", search_path)
        try:
            return hydra_compose(config_name, plain), plain
        finally:
            GlobalHydra.instance().clear()


def check_interpolations(composed: DictConfig, config_name: str) -> None:
    """Raise ConfigError for a ${key} that leads nowhere."""
    with explained(config_name, [RECIPES]):
        OmegaConf.to_container(composed, resolve=True)


def check_hydra(override: str) -> None:
    """Raise ConfigError for an override of Hydra's own settings (hydra.x, hydra/x) that it does not take."""
    GlobalHydra.instance().clear()
    version.setbase(VERSION_BASE)
    Hydra.create_main_hydra2("slime", create_config_search_path(str(RECIPES)))
    try:
        hydra_compose("base", [override], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{override}: Hydra has no such setting or value; `slime train --cfg hydra` shows its settings") from error
    finally:
        GlobalHydra.instance().clear()


def finish(composed: DictConfig, config_name: str, overrides: list[str]) -> Recipe:
    """Name the run and turn Hydra's config into dataclasses. Raises ConfigError for a required knob that nothing sets."""
    if OmegaConf.get_type(composed) is not SlimeConfig:
        raise no_beginning(config_name)
    code = overrides_hash(overrides)
    name = Path(config_name).stem
    if composed.run.name is None:
        composed.run.name = "-".join(filter(None, (name, code)))
    with explained(config_name, [RECIPES]):
        _expand_homes(composed)
        cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, SlimeConfig)
    return Recipe(cfg, composed, name, code)


def _expand_homes(composed: DictConfig) -> None:
    """Paths that begin with ~ become absolute, so that they mean the same on every host and in every process."""
    places = [(composed.model, "path"), (composed.rollout, "engine_python")]
    places += [(composed.run, knob) for knob in ("dir", "resume", "replay")]
    places += [(named, "path") for named in (*composed.data.train, *composed.data.eval.values())]
    for group, knob in places:
        path = None if OmegaConf.is_missing(group, knob) else group[knob]
        if isinstance(path, str) and path.startswith("~"):
            group[knob] = os.path.expanduser(path)


def overrides_hash(overrides: list[str]) -> str:
    """Eight hexadecimal digits for a set of overrides, in any order; empty where none of them changes what is run."""
    kept = sorted(text.lstrip("+") for text in overrides if text.lstrip("+").partition("=")[0] not in UNNAMED)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:8] if kept else ""
