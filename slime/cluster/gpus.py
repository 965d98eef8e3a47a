"""How much memory GPUs have, asked of nvidia-smi where they are: no process of slime's that computes nothing takes a CUDA context."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from slime.cluster import deadline
from slime.cluster.placement import RolePlacement
from slime.config.exits import PreflightError

ASK = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
ASK_S = 60.0
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Of a GPU, in bytes."""

    total: int
    free: int


def device_bytes(placement: RolePlacement) -> int | None:
    """Memory of the smallest GPU on the hosts of a placement, in bytes; None for CPUs. Raises PreflightError where nvidia-smi does not
    say."""
    if placement.device == "cpu":
        return None
    devices = range(len(placement.bundles))
    refs = [_ask_here.options(scheduling_strategy=placement.strategy(device)).remote() for device in devices]
    said: list[str] = deadline.get(refs, ASK_S, "the hosts of GPUs to say how much memory they have", "cluster.start_timeout_s")
    return min(memory.total for answer in said for memory in parse(answer))


def numbers_of(placement: RolePlacement, positions: list[int]) -> list[int]:
    """GPU numbers on their host of these devices of a placement; none for CPUs."""
    if placement.device == "cpu":
        return []
    ask = ray.remote(ray.get_gpu_ids)
    refs = [ask.options(num_cpus=0, num_gpus=placement.gpus, scheduling_strategy=placement.strategy(p)).remote() for p in positions]
    said = deadline.get(refs, ASK_S, f"the devices of {placement.role} to name their GPUs", "cluster.start_timeout_s")
    return [int(ids[0]) for ids in said]


def memory_of(gpus: Sequence[int]) -> list[Memory]:
    """Memory of these GPUs of this host. Raises PreflightError where nvidia-smi does not say."""
    return parse(_ask([*ASK, f"--id={','.join(map(str, gpus))}"]))


def parse(said: str) -> list[Memory]:
    """What nvidia-smi says: a line "81559, 81008" in MiB for every GPU. Raises PreflightError for anything else."""
    try:
        found = [Memory(*(int(word) * MIB for word in line.split(","))) for line in said.strip().splitlines()]
    except (ValueError, TypeError):
        found = []
    if not found:
        raise PreflightError(
            f"`{' '.join(ASK)}` says {' '.join(said.split())[:200] or 'nothing'}: cluster.share divides a GPU's memory and has to know it; "
            "set cluster.share=none"
        )
    return found


def _ask(command: list[str]) -> str:
    """Its lines, else what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S / 2)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


@ray.remote(num_cpus=0, max_retries=0)
def _ask_here() -> str:
    return _ask(ASK)
