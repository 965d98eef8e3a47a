"""What an SGLang server needs on a CPU: environment and server arguments.

Deterministic mode. A request with a `sampling_seed` gives the same ids and the same bits of log-probs alone, among any others, and on any
server with as many threads. That takes all of these, each found by measuring:

    --enable-deterministic-inference   seeded sampling (ignored without it); switches the radix cache off for torch_native, whose cached
                                       keys may come from another kernel (decode) than a prefill would use
    --chunked-prefill-size -1          chunks begin where other requests of the batch leave room, and attention adds by chunks
    SLIME_CPU_BATCH_INVARIANT=1        matrix products in blocks of 16 rows, and seeded sampling in vocabulary order (see cpu/sglang/)
    OMP_NUM_THREADS                    the same on every server: BLAS divides its sums among threads
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHIMS = Path(__file__).parent / "sglang"  # for PYTHONPATH of CPU engines only


def environment(deterministic: bool, threads: int = 1, ranks: int = 1) -> dict[str, str]:
    """Environment variables of a server with `ranks` devices of `threads` CPU threads each, to be laid over the process's own."""
    paths = [str(SHIMS), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",  # the sampler's compiled helpers would need a compiler at run time
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "SLIME_CPU_BATCH_INVARIANT": "1" if deterministic else "0",
    }
    if ranks > 1:  # SGLang asks for one entry a rank where there are more ranks than NUMA nodes; without AMX it binds nothing
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))
    return variables


def arguments(deterministic: bool) -> dict[str, Any]:
    """Server arguments by SGLang's names. What sizes the KV pool is not here: it depends on the recipe."""
    chosen: dict[str, Any] = {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_overlap_schedule": True,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # an idle scheduler would spin on a core that a trainer rank needs
        "mem_fraction_static": 0.5,  # max_total_tokens decides; SGLang's own guess turns negative without chunks
    }
    if deterministic:
        chosen |= {"enable_deterministic_inference": True, "chunked_prefill_size": -1}
    return chosen


def arguments_on(device: str, deterministic: bool, pool: Mapping[str, int], of_gpus: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with the size of the KV pool where the device is a CPU, those of GPUs where it is not."""
    return arguments(deterministic) | dict(pool) if device == "cpu" else dict(of_gpus)


def environment_on(device: str, deterministic: bool, threads: int, ranks: int) -> dict[str, str]:
    """`environment` where the device is a CPU, the number of threads alone where it is not."""
    return environment(deterministic, threads, ranks) if device == "cpu" else {"OMP_NUM_THREADS": str(threads)}
