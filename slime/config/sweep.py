"""The jobs of a sweep (--multirun), which must not share a directory."""

from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.load import UNNAMED


def split(task: list[str]) -> list[list[str]]:
    """The overrides of every job, in Hydra's order."""
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(task), None)
    return [list(job) for batch in batches for job in batch]


def check_directories(jobs: list[tuple[list[str], SlimeConfig]]) -> None:
    """Raise ConfigError for two jobs that would write into one directory."""
    taken: dict[Path, tuple[int, list[str]]] = {}
    for number, (overrides, cfg) in enumerate(jobs):
        directory = Path(cfg.run.dir).resolve() / str(cfg.run.name)
        if directory not in taken:
            taken[directory] = number, overrides
            continue
        other, others = taken[directory]
        swept = [text.lstrip("+").partition("=")[0] for text in overrides if text not in others]
        if not swept:
            raise ConfigError(f"jobs {other} and {number} of this sweep are the same: {' '.join(overrides)}; remove one")
        inside = " and ".join(f"${{{key}}}" for key in swept if not key.startswith("run.name")) or "what differs between them"
        shared = f"jobs {other} and {number} of this sweep share run.dir={cfg.run.dir}, run.name={cfg.run.name}"
        if any(text.startswith("run.name=") for text in overrides) and not _unnamed(swept):
            raise ConfigError(f"{shared}: leave run.name out, or put {inside} in it")
        raise ConfigError(f"{shared}: set run.name with {inside} in it, as in 'run.name=mine-{inside.partition(' ')[0]}'")


def _unnamed(swept: list[str]) -> bool:
    """Whether a run's own name would not differ either."""
    return all(key in UNNAMED for key in swept)
