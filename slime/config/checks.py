"""What the type of a knob cannot say: choices, bounds, paths, sizes that do not divide, options that would do nothing.

`check` reads the config and the files that it names, starts nothing, and raises the first ConfigError that it finds: the value, the
place and the mend. Each file of checks has one subject; what other libraries know (SGLang's and megatron-core's options) is checked by
the rooms that hold them.
"""

import dataclasses
import math
from typing import Any, Literal

from slime.config import SlimeConfig
from slime.config.check_combinations import CPU_ONLY, check_combinations
from slime.config.check_files import check_files
from slime.config.check_fp8 import FP8_ON_GPU, check_fp8
from slime.config.check_functions import check_functions
from slime.config.check_serving import check_serving
from slime.config.check_share import SWAP_ON_GPU, check_share
from slime.config.check_sizes import check_sizes
from slime.config.exits import ConfigError, PreflightError
from slime.config.roles import swaps
from slime.config.tree import figure, nearest

SIGNS = {
    "low": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "high": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}


def check(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first thing that is wrong with a recipe."""
    check_values(cfg)
    check_functions(cfg)
    check_combinations(cfg)
    check_sizes(cfg)
    check_share(cfg)
    check_serving(cfg)
    check_files(cfg)
    check_fp8(cfg)


def check_device(cfg: SlimeConfig, device: Literal["cpu", "cuda"]) -> None:
    """What only the cluster tells: cluster.device=auto became `device`. Raises PreflightError where the recipe needs the other."""
    if cfg.run.deterministic and device == "cuda":
        raise PreflightError(f"run.deterministic=true with cluster.device={cfg.cluster.device}, which is cuda here: {CPU_ONLY}")
    if cfg.rollout.quantization == "fp8" and device == "cpu":
        raise PreflightError(f"rollout.quantization=fp8 with cluster.device={cfg.cluster.device}, which is cpu here: {FP8_ON_GPU}")
    if swaps(cfg) and device == "cpu":
        raise PreflightError(f"cluster.share=swap with cluster.device={cfg.cluster.device}, which is cpu here: {SWAP_ON_GPU}")


def check_values(group: Any, prefix: str = "") -> None:
    """Every knob below a dataclass against the choices and bounds that its field states."""
    for field in dataclasses.fields(group):
        value, path = getattr(group, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_values(value, path + ".")
        elif isinstance(value, list | dict):
            for step, item in value.items() if isinstance(value, dict) else enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_values(item, f"{path}.{step}.")
        elif value is not None:
            _check_choice(path, value, field.metadata)
            _check_bounds(path, value, field.metadata)


def _check_choice(path: str, value: Any, metadata: Any) -> None:
    choices = metadata.get("choices")
    if choices and value not in choices:
        quote = (
            f'; YAML reads a bare off as false: write {path.rpartition(".")[2]}: "off"'
            if value == "False" and "off" in choices
            else nearest(value, choices)
        )
        raise ConfigError(f"{path}={value}: takes {', '.join(choices)}{quote}")


def _check_bounds(path: str, value: Any, metadata: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value:g}: takes a finite number")
    for name, (words, holds) in SIGNS.items():
        bound = metadata.get(name)
        if bound is not None and not holds(value, bound):
            raise ConfigError(f"{path}={figure(value)}: must be {words} {figure(bound)}")
