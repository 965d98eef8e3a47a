"""What a recipe's servers are started with: SGLang's arguments by name, environment, and the size of the KV pool on a CPU.

The pool on a CPU. SGLang would take 84 % of the host's memory. Instead the pool holds every request that a server may run at once at its
longest, so that none is ever retracted:

    max_running_requests  requests of a step, divided among the servers, at most rollout.max_in_flight and 256,
                          fewer where the pool would pass 2 GiB
    max_total_tokens      max_running_requests x (data.max_prompt_tokens + rollout.max_response_tokens + 1), rounded up to 1024

On CUDA, SGLang sizes its pool itself.

Deterministic mode fixes some arguments; a recipe may not change those.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import slime
from slime.config import SlimeConfig
from slime.config.check_files import model_config
from slime.config.check_serving import longest_answers
from slime.config.plan_memory import kv_bytes_per_token
from slime.config.roles import swaps
from slime.cpu import serving
from slime.engine.arguments import cache_dir
from slime.engine.fp8_model import fp8_model_dir
from slime.models.registry import has_experts

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LOADER = "slime.sync.inserver.load"  # takes the weight channel's commands inside SGLang
MOST_RUNNING = 256
POOL_BYTES = 2 << 30
ROUND_TO = 1024

# Arguments that run.deterministic fixes, and why; see slime/cpu/serving.py.
FIXED: dict[str, tuple[Any, str]] = {
    "enable_deterministic_inference": (True, "seeded sampling is ignored without it"),
    "chunked_prefill_size": (-1, "chunks would begin where other requests of the batch leave room"),
    "enable_mixed_chunk": (False, "chunks would begin where other requests of the batch leave room"),
    "attention_backend": ("torch_native", "equal bits are proven for it alone"),
    "prefill_attention_backend": (None, "equal bits are proven for torch_native alone"),
    "decode_attention_backend": (None, "equal bits are proven for torch_native alone"),
    "sampling_backend": ("pytorch", "it alone draws from a request's seed"),
    "disable_radix_cache": (True, "cached keys may come from another kernel than a prefill would use"),
    "disable_overlap_schedule": (True, "equal bits are proven without it"),
    "speculative_algorithm": (None, "drafts change how tokens are drawn"),
}

Device = Literal["cpu", "cuda"]


def server_arguments(cfg: SlimeConfig, device: Device) -> dict[str, Any]:
    """SGLang's server arguments; what rollout.sglang says comes last.

    Raises ValueError for a pool that cannot hold one answer, and for what run.deterministic does not allow.
    """
    check_deterministic(cfg)
    chosen: dict[str, Any] = {
        "model_path": cfg.model.path,
        "dtype": DTYPES[cfg.model.dtype],
        "tp_size": cfg.rollout.tensor_parallel,
        "device": device,
        "random_seed": cfg.run.seed,
        "quantization": None,
        "log_level_http": "warning",
    }
    if cfg.rollout.replay_experts and has_experts(cfg.model):
        chosen["enable_return_routed_experts"] = True
    if cfg.rollout.quantization == "fp8":
        chosen |= {"model_path": str(fp8_model_dir(Path(cfg.model.path))), "load_format": "dummy", "quantization": "fp8"}
    of_gpus = {"enable_memory_saver": True} if swaps(cfg) else {}
    chosen |= serving.arguments_on(device, cfg.run.deterministic, cpu_pool(cfg), of_gpus)
    chosen |= cfg.rollout.sglang
    chosen["custom_weight_loader"] = [LOADER, *(cfg.rollout.sglang.get("custom_weight_loader") or [])]
    _check_pool(cfg, chosen)
    return chosen


def check_deterministic(cfg: SlimeConfig) -> None:
    """Raises ValueError for a value in rollout.sglang that run.deterministic fixes otherwise."""
    if not cfg.run.deterministic:
        return
    for name, (fixed, why) in FIXED.items():
        value = cfg.rollout.sglang.get(name, fixed)
        if value != fixed:
            raise ValueError(
                f"rollout.sglang.{name}={_word(value)} with run.deterministic=true, which fixes it at {_word(fixed)}: {why}; remove it"
            )
    for name in ("max_running_requests", "max_total_tokens"):
        if name in cfg.rollout.sglang and cfg.rollout.sglang[name] is None:
            raise ValueError(
                f"rollout.sglang.{name}=null with run.deterministic=true: SGLang would choose it, and the pool must hold every running "
                "request; give a number, or remove it"
            )


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def server_environment(cfg: SlimeConfig, device: Device, cpus: float) -> dict[str, str]:
    """The whole environment of a server whose devices reserve `cpus` CPUs each."""
    own = serving.environment_on(device, cfg.run.deterministic, max(1, int(cpus)), cfg.rollout.tensor_parallel)
    paths = [own.get("PYTHONPATH") or os.environ.get("PYTHONPATH", ""), str(import_folder())]
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def import_folder() -> Path:
    """A folder that holds the package slime and nothing else of its environment: rollout.engine_python imports LOADER from there."""
    package = Path(slime.__path__[0])
    folder = cache_dir() / "import" / hashlib.sha256(str(package).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "slime"
    if not link.is_symlink():
        partial = folder / f".{os.getpid()}"
        partial.symlink_to(package)
        partial.replace(link)
    return folder


def cpu_pool(cfg: SlimeConfig) -> dict[str, int]:
    """max_running_requests and max_total_tokens, see the module."""
    step = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
    wanted = -(-min(step, cfg.rollout.max_in_flight) // cfg.rollout.engines)
    longest = longest_request(cfg)
    config = model_config(cfg) if (Path(cfg.model.path) / "config.json").exists() else None  # None: the model is not on this host yet
    affordable = POOL_BYTES // (longest * (kv_bytes_per_token(cfg, config) if config else 1))
    running = max(1, min(wanted, MOST_RUNNING, affordable))
    return {"max_running_requests": running, "max_total_tokens": -(-running * longest // ROUND_TO) * ROUND_TO}


def longest_request(cfg: SlimeConfig) -> int:
    """Tokens of the longest prompt with the longest answer, and one that SGLang reserves."""
    return cfg.data.max_prompt_tokens + longest_answer(cfg)[1] + 1


def longest_answer(cfg: SlimeConfig) -> tuple[str, int]:
    """The knob that allows the longest answer, and its tokens."""
    return max(longest_answers(cfg).items(), key=lambda item: item[1])


def _check_pool(cfg: SlimeConfig, chosen: dict[str, Any]) -> None:
    """In deterministic mode nothing may be retracted; in any mode one request must fit. A pool of null is SGLang's to size, and so is one
    that nobody gives."""
    running = chosen["max_running_requests"] if cfg.run.deterministic else 1
    needed, tokens = running * longest_request(cfg), chosen.get("max_total_tokens")
    if tokens is not None and tokens < needed:
        what = f"{running} requests at once, as run.deterministic needs" if cfg.run.deterministic else "one request"
        raise ValueError(
            f"rollout.sglang.max_total_tokens={tokens}: too few for {what}, of {longest_request(cfg)} tokens (data.max_prompt_tokens + "
            f"{longest_answer(cfg)[0]} + 1); {needed} are needed"
        )
