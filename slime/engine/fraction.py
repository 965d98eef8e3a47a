"""An engine that is started anew beside a rank (cluster.share=split): its part of the device, as SGLang wants it then.

rollout.sglang.mem_fraction_static is a fraction of what is free when a server starts: of all for the first one. When its successor starts
the rank has its memory, and the same bytes are a larger fraction of what is left.

    80 GiB, of which 0.4 were the engine's and 38 are free: 0.4 x 80 / 38 = 0.842
"""

from collections.abc import Sequence
from dataclasses import replace

from slime.cluster.gpus import Memory, memory_of
from slime.config import SlimeConfig
from slime.config.check_share import FRACTION
from slime.config.roles import shares
from slime.engine.server import ServerSpec

OPTION = f"--{FRACTION.replace('_', '-')}="
MOST = 0.98


def beside_rank(cfg: SlimeConfig, spec: ServerSpec) -> ServerSpec:
    """What the successor of a server is started with. Raises PreflightError where a GPU's memory is not known."""
    gpus = spec.environment.get("CUDA_VISIBLE_DEVICES", "")
    if not shares(cfg) or cfg.cluster.share != "split" or not any(word.startswith(OPTION) for word in spec.words) or not gpus:
        return spec
    found = of_free(cfg.rollout.sglang[FRACTION], memory_of([int(gpu) for gpu in gpus.split(",")]))
    return replace(spec, words=[f"{OPTION}{found:.4f}" if word.startswith(OPTION) else word for word in spec.words])


def of_free(fraction: float, devices: Sequence[Memory]) -> float:
    """The fraction of the fullest device's free memory that is `fraction` of all of it, at most MOST."""
    return min(MOST, max(fraction * memory.total / max(1, memory.free) for memory in devices))
