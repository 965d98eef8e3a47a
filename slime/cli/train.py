"""`slime train --config-name RECIPE key=value ...`: a Hydra app whose mistakes are found before Hydra answers."""

import sys
import warnings

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from slime.cli.endings import exiting
from slime.cli.help import train_help
from slime.config import SlimeConfig
from slime.config.check_files import is_hub_id
from slime.config.checks import check
from slime.config.exits import ConfigError
from slime.config.load import VERSION_BASE, Recipe, check_hydra, check_interpolations, compose, compose_tree, finish
from slime.config.overrides import prepare
from slime.config.plan import plan
from slime.config.plan_view import show
from slime.config.recipes import RECIPES, recipe_folders, recipe_names
from slime.config.sweep import check_directories, split
from slime.engine import arguments, settings
from slime.models.check_layout import check_model


def main(argv: list[str]) -> None:
    """Run the recipe. Raises ConfigError before anything starts; a run's own ending raises SystemExit with its code."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(train_help())
        return
    plain = prepare(argv)
    check_composition(plain)
    sys.argv = ["slime train", *plain, "hydra/job_logging=none", "hydra/hydra_logging=none"]  # logging is slime.observe's
    hydra.main(config_path=str(RECIPES), config_name="base", version_base=VERSION_BASE)(job)()


def job(composed: DictConfig) -> None:
    """One run, of a sweep or alone; called by Hydra."""
    with exiting():
        hydra_config = HydraConfig.get()
        recipe = finish(composed, hydra_config.job.config_name or "base", list(hydra_config.overrides.task))
        check(recipe.cfg)
        check_options(recipe.cfg)
        if recipe.cfg.run.dry_run:
            sweeps = hydra_config.mode is RunMode.MULTIRUN
            dry_run(recipe, f"job {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)}" if sweeps else None)
        else:
            from slime.train import main as train

            train(recipe.cfg, recipe.resolved)


def check_composition(argv: list[str]) -> None:
    """Compose the recipe once for every job, so that what Hydra would say comes in our words. Raises ConfigError."""
    given = get_args_parser().parse_args(argv)
    if given.info or given.shell_completion or given.hydra_help:
        return
    hydras = [text for text in given.overrides if text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    task = [text for text in given.overrides if text not in hydras]
    for text in hydras:
        check_hydra(text)
    name = given.config_name or "base"
    if given.cfg:
        tree, _ = compose_tree(name, task, given.config_dir)
        if given.resolve and given.cfg != "hydra":
            check_interpolations(tree, name)
        return
    if given.config_name is None and not any(text.startswith(("model.path=", "model=")) for text in task):
        recipes = [recipe for recipe in recipe_names(recipe_folders(given.config_dir)) if recipe != "base"]
        raise ConfigError(f"--config-name is missing: name a recipe; there are {', '.join(recipes)}")
    sweeps = given.multirun and not any(text.startswith("hydra/sweeper=") for text in hydras)
    jobs = split(task) if sweeps else [task]
    composed = [(overrides, compose(name, overrides, given.config_dir).cfg) for overrides in jobs]
    check_directories(composed)


def check_options(cfg: SlimeConfig) -> None:
    """SGLang's and megatron-core's own options against their own lists, each slow to read, so only where an option is given; and of a dry
    run, whether the model can be divided as asked."""
    try:
        if cfg.trainer.megatron:
            with warnings.catch_warnings(action="ignore"):  # of kernels that megatron-core would use where they are installed
                from slime.trainer.options import sort_options
            sort_options(cfg.trainer.megatron)
        if cfg.rollout.sglang:
            arguments.check(cfg.rollout.sglang, arguments.known_arguments(cfg.rollout.engine_python))
            settings.check_deterministic(cfg)
        if cfg.run.dry_run and not is_hub_id(cfg.model.path):  # a run checks its model with its data
            check_model(cfg, headers=False)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def dry_run(recipe: Recipe, heading: str | None) -> None:
    """Print the resolved recipe and the resource plan; in a sweep below a heading."""
    console = Console()
    if heading is not None:
        console.rule()
        console.print(Text(heading), soft_wrap=True)
    console.print(Syntax(recipe.resolved, "yaml", background_color="default"))
    show(recipe.cfg, plan(recipe.cfg), console)
