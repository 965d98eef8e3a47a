"""A custom SGLang weight loader for tests: it makes the next writes of the weight channel fail half done, in one rank.

The update that reaches it is one empty tensor named by a JSON record: rank, times, and how: the name of an exception, or "kill", which
ends the rank's process as kill -9 does.
"""

import builtins
import json
import os
import signal
from collections.abc import Iterable
from typing import Any

import torch

from slime.sync import native
from slime.sync.kernels.scatter import Scatter, unsigned

LOADER = "tests.engine.fault_loader.load"
WRITE = Scatter.write


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's hook."""
    plan = json.loads(next(iter(named_tensors))[0])
    if torch.distributed.get_rank() != plan["rank"]:
        return

    def fails(scatter: Scatter) -> None:
        if not plan["times"]:
            WRITE(scatter)
            return
        plan["times"] -= 1
        half = scatter.segments[: max(1, len(scatter.segments) // 2)]
        native.scatter(half, unsigned(scatter.index), unsigned(scatter.bits))
        if plan["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise getattr(builtins, plan["how"])("as the test wants it")

    Scatter.write = fails  # type: ignore[method-assign]
