"""The files of recipes: where they lie, which there are, and what one must begin with."""

from importlib.resources import files
from pathlib import Path

import yaml

from slime.config.exits import ConfigError

RECIPES = Path(str(files("slime_recipes")))
SCHEMA = "slime_schema"  # what recipes/base.yaml begins with: the dataclasses
BEGINNING = "`defaults: [base, _self_]`"


def recipe_folders(config_dir: str | Path | None) -> list[Path]:
    """Where recipes and their groups lie. Raises ConfigError for a --config-dir that is not there, or that hides what slime has."""
    if not config_dir:
        return [RECIPES]
    own = Path(config_dir)
    if not own.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    if own.resolve() == RECIPES.resolve():
        return [RECIPES]
    for name in [f"{SCHEMA}.yaml", *sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))]:
        if (own / name).exists():
            raise ConfigError(f"--config-dir {config_dir}: {name} has the name of a recipe of slime's; rename it")
    return [RECIPES, own]


def recipe_names(folders: list[Path]) -> list[str]:
    """Names for --config-name."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def check_beginning(config_name: str, folders: list[Path]) -> None:
    """Raise ConfigError for a recipe that builds on no other, so that Hydra would know no knob. What is not there is Hydra's to tell."""
    name = config_name.removesuffix(".yaml")
    path = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return
    begins = content.get("defaults") if isinstance(content, dict) else None
    if not isinstance(begins, list) or not any(isinstance(each, str) and each != "_self_" for each in begins):
        raise no_beginning(config_name)


def no_beginning(config_name: str) -> ConfigError:
    """The error for a recipe that does not lead to the dataclasses."""
    return ConfigError(f"recipe {config_name} does not begin with {BEGINNING}")
