"""Which algorithm a recipe names."""

import difflib

from slime.algorithms import cispo, grpo, gspo, opd, ppo, reinforce_pp, rloo, sft
from slime.algorithms.base import Algorithm
from slime.config.algorithm import AlgorithmConfig
from slime.config.imports import load_function

BUILDERS = {
    "grpo": grpo.build,
    "rloo": rloo.build,
    "reinforce_pp": reinforce_pp.build,
    "reinforce_pp_baseline": reinforce_pp.build_with_baseline,
    "ppo": ppo.build,
    "gspo": gspo.build,
    "cispo": cispo.build,
    "opd": opd.build,
    "sft": sft.build,
}


def build_algorithm(cfg: AlgorithmConfig) -> Algorithm:
    """The algorithm of `algorithm.name`: a built-in, or what `pkg.mod:fn` returns for this AlgorithmConfig.

    Raises ValueError for an unknown name (with the nearest one), for a path that cannot be imported, and for a function that
    returns something else.
    """
    if cfg.name in BUILDERS:
        return BUILDERS[cfg.name](cfg)
    if ":" not in cfg.name:
        near = difflib.get_close_matches(cfg.name, BUILDERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(BUILDERS)} or pkg.mod:fn"
        raise ValueError(f"algorithm.name={cfg.name}: no such algorithm; {hint}")
    built = load_function(cfg.name, "algorithm.name")(cfg)
    if not isinstance(built, Algorithm):
        raise ValueError(f"algorithm.name={cfg.name} returned {type(built).__name__}; it must return slime.algorithms.base.Algorithm")
    return built
