"""How much memory the GPUs of a role have, asked where they are."""

import subprocess

import ray

from slime.cluster import deadline
from slime.cluster.placement import RolePlacement
from slime.config.exits import PreflightError

ASK = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
ASK_S = 60.0
MIB = 1 << 20


def device_bytes(placement: RolePlacement) -> int:
    """Memory of the smallest GPU on the hosts of a placement. Raises PreflightError where nvidia-smi does not say."""
    refs = [_totals.options(scheduling_strategy=placement.strategy(device)).remote() for device in range(len(placement.bundles))]
    said: list[str] = deadline.get(refs, ASK_S, "the hosts of GPUs to say how much memory they have", "cluster.start_timeout_s")
    words = [word for answer in said for word in answer.split()]
    if not words or not all(word.isdigit() for word in words):
        raise PreflightError(
            f"`{' '.join(ASK)}` on a host of cluster.roles.{placement.role} says {' '.join(words)[:200] or 'nothing'}: cluster.share divides "
            "a GPU's memory and has to know it; set cluster.share=none"
        )
    return min(map(int, words)) * MIB


@ray.remote(num_cpus=0, max_retries=0)
def _totals() -> str:
    """Mebibytes of every GPU of this host, a line each; else what went wrong."""
    try:
        done = subprocess.run(ASK, capture_output=True, text=True, timeout=ASK_S / 2)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return done.stdout if done.returncode == 0 else done.stderr
