"""What lets megatron-core (0.14 - 0.16) run on the CPU and gloo.

megatron-core names CUDA in about 25 places of the training path. `install()` and `scope()` make those places mean the CPU:

    torch.cuda.current_device(), synchronize()               patched once a process
    device="cuda", pin_memory=True, Tensor.cuda() and
    Tensor.type() compared with "torch.cuda.FloatTensor"     a function mode, on within `scope()`
    the CUDA RNG tracker                                     a tracker over torch's CPU generator
    the MoE dispatcher's device-to-host stream               nothing to copy
    gathers of unequal parts between tensor-parallel         gloo has none: gathered padded; summed whole, then cut
    ranks that share experts, and their reduce-scatters

Where the CPU has no bf16 instructions, bf16 matrix products are computed in fp32 and rounded, which is what their emulation
yields, and about ten times as fast.

A function mode belongs to one thread: whatever runs megatron-core code enters `scope()` in its own thread.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
EMULATES_BF16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_thread = threading.local()


@functools.cache
def install() -> None:
    """Patch megatron-core and torch in this process, once. There must be no CUDA device to mistake for the CPU."""
    assert not torch.cuda.is_available(), "hide the CUDA devices (CUDA_VISIBLE_DEVICES) of a rank that computes on the CPU"
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    _stay_in_scope_backward()
    _use_cpu_rng()
    _use_host_splits_in_moe()
    _exchange_unequal_parts()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """In this thread, CUDA means CPU until the block ends. May be nested."""
    if getattr(_thread, "inside", False):
        yield
        return
    _thread.inside = True
    try:
        with _CudaIsCpu():
            yield
    finally:
        _thread.inside = False


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:
            device = kwargs.get("device")
            if (device is not None and torch.device(device).type == "cuda") or kwargs.get("pin_memory"):
                kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
            return func(*args, **kwargs)
        if EMULATES_BF16 and func in PRODUCTS and args[0].dtype == torch.bfloat16:
            return func(args[0].float(), args[1].float()).bfloat16()
        result = func(*args)
        if func is torch.Tensor.type and len(args) == 1 and _called_by_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _called_by_megatron() -> bool:
    """Whether the function that called into the mode is megatron-core's."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _stay_in_scope_backward() -> None:
    """torch leaves a function mode while it handles `backward`; megatron-core's own backward functions need it."""
    run_backward = torch.autograd._engine_run_backward

    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _CudaIsCpu() if getattr(_thread, "inside", False) else contextlib.nullcontext():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = scoped


def _use_cpu_rng() -> None:
    """Dropout, initialisation and recomputation draw from torch's CPU generator."""
    import megatron.core.tensor_parallel.random as rng

    class CpuRNGStatesTracker(rng.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG state {name} or its seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = rng._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"RNG state {name} was not added")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    rng._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _use_host_splits_in_moe() -> None:
    """The all-to-all dispatcher's split sizes are on the host already."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def to_host(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point and not self.drop_and_pad:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                splits = getattr(self, name)
                if torch.is_tensor(splits):
                    setattr(self, name, splits.numpy())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = CPU  # anything but None: no torch.cuda.Stream() is made
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = to_host


def _exchange_unequal_parts() -> None:
    """Tensor-parallel ranks of an expert hold different numbers of its tokens; gloo's collectives take equal parts only."""
    import megatron.core.tensor_parallel.mappings as mappings

    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather_equal(x, group, None, use_global_buffer)
        sizes, padded = [int(size) for size in sizes], x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = gather_equal(padded, group).view(len(sizes), *padded.shape)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter(x: torch.Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return scatter_equal(x, group, None, use_global_buffer)
        whole = x.contiguous().clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split([int(size) for size in sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter
