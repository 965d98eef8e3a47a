"""megatron-core's small helpers as they are written: `megatron.core.jit`, which it decorates them with, as a module that leaves them alone.

Its own passes each through torch.compile. Importing that takes a rank 2 s, compiling them takes a first step longer, and what is worth a
kernel has one of ours (kernels/). On a CPU it would need a compiler.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def leave_alone(function: F) -> F:
    return function


def install() -> None:
    """Before megatron-core is imported."""
    module = ModuleType("megatron.core.jit")
    module.jit_fuser = module.noop_decorator = leave_alone  # type: ignore[attr-defined]
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None  # type: ignore[attr-defined]
    sys.modules.setdefault(module.__name__, module)
