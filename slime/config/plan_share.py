"""Whether trainer and engine fit on one device (cluster.share), by arithmetic alone.

    split   rank + RESERVED + engine's work + staged + fraction x device <= device     both at once
    swap    rank + 2 x RESERVED <= device                                              the trainer, beside what a released engine keeps
            fraction x device + engine's work + staged + RESERVED <= device            the engine, beside what an offloaded rank keeps
    both    weights + KV cache of the longest request <= fraction x device

`rank` and the engine's weights and cache are the estimates of plan_memory. RESERVED is what a process keeps whatever happens: CUDA context,
libraries, NCCL's buffers. The engine's work, activations and CUDA graphs, is WORK of the device; SGLang counts it outside
rollout.sglang.mem_fraction_static, which is a fraction of what is free when the engine starts: of all, since with `split` engines start
first and with `swap` the ranks have given their memory away by then. `staged` is the largest version that is laid beside an engine's
weights before it is written into them: STAGE_MOST of theirs, with the bits that it replaces.

Where the recipe does not state the fraction, it is the largest that fits, rounded down to a hundredth.

    80 GiB, rank 40 GiB, engine's work 8 GiB, staged 2 GiB     split: 1 - (40 + 2 + 8 + 2) / 80 = 0.35     swap: 1 - (8 + 2 + 2) / 80 = 0.85
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from slime.config import SlimeConfig
from slime.config.check_share import FRACTION
from slime.config.exits import ConfigError
from slime.config.plan_memory import EngineMemory, RankMemory, longest

GIB = 1 << 30
RESERVED = 2 * GIB
WORK = 0.1  # of a device
MOST = 1 - WORK
STAGE_MOST = 0.25  # of an engine rank's weights: more is not staged beside them but loaded whole
REPLACED = 4 / 3  # a staged file has 6 bytes for an element of 2, and the 2 that they replace lie beside it
KNOB = f"rollout.sglang.{FRACTION}"
LOWER = "lower trainer.max_tokens_per_rank, set sync.snapshot=host, or divide the model over more devices"


@dataclass(frozen=True)
class SharePlan:
    """What lies on a device that a rank and an engine share. Bytes."""

    share: Literal["split", "swap"]
    rank: int  # at most
    engine: int  # at least: its weights, and the KV cache of the longest request
    staged: int  # at most, beside the engine's
    fraction: float | None  # that the recipe states

    @property
    def beside(self) -> int:
        """What an engine's part and work leave free."""
        return RESERVED + self.staged + (self.rank if self.share == "split" else 0)

    def least(self) -> int:
        """The smallest device on which some fraction fits, or the one that is stated. Raises ConfigError where that fits on none."""
        if self.fraction is not None and self.fraction >= MOST:
            raise ConfigError(
                f"{KNOB}={self.fraction:g} with cluster.share={self.share}: {WORK:.0%} of a device are for what an engine computes with, "
                f"and something stays with the rank; set it below {MOST:g}"
            )
        if self.fraction is None:
            both = (self.beside + self.engine) / (MOST - 0.01)  # what rounding takes
        else:
            both = max(self.beside / (MOST - self.fraction), self.engine / self.fraction)
        alone = self.rank + 2 * RESERVED if self.share == "swap" else 0
        return math.ceil(max(both, alone))

    def fit(self, device: int) -> float:
        """The fraction for a device of that many bytes. Raises ConfigError where the two do not fit, naming the knob."""
        said = f"cluster.share={self.share} on devices of {_gib(device)}"
        if self.share == "swap" and self.rank + 2 * RESERVED > device:
            raise ConfigError(f"{said}: a rank takes about {_gib(self.rank)} and {_gib(2 * RESERVED)} stay occupied; {LOWER}")
        most = math.floor((MOST - self.beside / device) * 100) / 100
        chosen = most if self.fraction is None else self.fraction
        if self.fraction is not None and self.fraction > max(most, 0):
            held = f"a rank takes about {_gib(self.rank)}, and " if self.share == "split" else ""
            free = _gib(RESERVED + self.staged + WORK * device)
            at_most = f"{KNOB} can be {most:.2f} at most" if most > 0 else f"nothing is left for an engine; {LOWER}"
            raise ConfigError(f"{KNOB}={self.fraction:g} with {said}: {held}{free} stay free of it; {at_most}")
        if self.engine > chosen * device:
            left = f"{KNOB}={self.fraction:g} leaves an engine" if self.fraction is not None else "an engine is left"
            mend = f"raise it, {LOWER}" if self.fraction is not None else LOWER
            raise ConfigError(
                f"{said}: {left} {_gib(max(0.0, chosen * device))}, and its weights with the KV cache of the longest request take "
                f"{_gib(self.engine)}; {mend}, or raise rollout.tensor_parallel"
            )
        return chosen


def share_plan(cfg: SlimeConfig, rank: RankMemory, engine: EngineMemory) -> SharePlan:
    """Of a recipe that shares, from the estimates of a rank and of an engine."""
    share: Literal["split", "swap"] = "swap" if cfg.cluster.share == "swap" else "split"
    least = engine.weights + engine.kv_per_token * longest(cfg)
    return SharePlan(share, rank.total, least, math.ceil(engine.weights * STAGE_MOST * REPLACED), cfg.rollout.sglang.get(FRACTION))


def with_fraction(cfg: SlimeConfig, fraction: float) -> SlimeConfig:
    """The recipe with the engines' part of a device stated."""
    return replace(cfg, rollout=replace(cfg.rollout, sglang={**cfg.rollout.sglang, FRACTION: fraction}))


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
