"""megatron-core in one process, for tools that hold a whole model on the CPU."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from slime.trainer import device, distributed
from slime.trainer.distributed import Parallel

TIMEOUT_S = 3600.0  # of collectives, which wait for nobody here


@contextlib.contextmanager
def alone() -> Iterator[Parallel]:
    """The process groups of a rank that has no others; they are left when the block ends. Hide CUDA devices before torch is imported."""
    cpu = device.set_up("cpu", os.cpu_count() or 1)
    distributed.use_interface_of("127.0.0.1")
    try:
        with cpu.scope():
            yield distributed.join_groups(cpu, dist.HashStore(), 0, 1, parallel_sizes(TrainerConfig()), 0, TIMEOUT_S)
    finally:
        distributed.leave_groups()
