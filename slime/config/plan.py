"""What a recipe will occupy, by arithmetic alone: devices by role, the batch, memory of a rank and of an engine.

Memory of a rank, in bytes a parameter of its tensor-parallel share, for the distributed optimizer over `d` data-parallel ranks
(megatron-core, "Distributed Optimizer": theoretical memory):

    bf16    2 parameter + 4 gradient (fp32) + (4 main parameter + 8 Adam moments) / d
    fp32    4 parameter + 4 gradient        +  8 Adam moments / d

Activations of one micro-batch: 34 x hidden x layers bytes a token in bf16, twice that in fp32, over the tensor-parallel ranks
(Korthikanti et al. 2022, equation 2 without attention scores, which are never stored); an estimate, recomputation lowers it.

An engine's device holds its share of the weights and, a token, 2 x layers x kv_heads x head_dim values of KV cache.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.config.check_files import model_config
from slime.config.exits import ConfigError
from slime.config.roles import RoleNeed, role_needs

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class BatchPlan:
    """One step in numbers. Token counts are upper bounds: every prompt and answer as long as allowed."""

    prompts: int
    samples: int  # of all prompts
    updates: int  # optimizer steps on one batch
    samples_per_update: int
    data_parallel: int
    samples_per_rank: int  # in one update, at most
    tokens_per_rank: int  # in one update, at most
    micro_batches: int  # in one update, at most


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device of the trainer and of an engine."""

    parameters: int  # of the whole model
    rank_weights: int
    rank_gradients: int
    rank_optimizer: int
    rank_activations: int
    engine_weights: int
    engine_kv_per_token: int
    engine_kv_wanted: int  # for every request that may be in flight, at full length

    @property
    def rank_total(self) -> int:
        return self.rank_weights + self.rank_gradients + self.rank_optimizer + self.rank_activations


@dataclass(frozen=True)
class Plan:
    """The resource plan of a recipe. `memory` is None for a model that is still on the hub."""

    roles: dict[str, RoleNeed]
    batch: BatchPlan
    memory: MemoryPlan | None


def plan(cfg: SlimeConfig) -> Plan:
    """The plan of a checked recipe; reads the model's config.json and the headers of its safetensors."""
    batch = batch_plan(cfg)
    return Plan(role_needs(cfg), batch, memory_plan(cfg, batch))


def batch_plan(cfg: SlimeConfig) -> BatchPlan:
    """Prompts x samples, divided into updates, ranks and micro-batches."""
    trainer, supervised = cfg.trainer, cfg.algorithm.name == "sft"
    samples = cfg.rollout.prompts_per_step * (1 if supervised else cfg.rollout.samples_per_prompt)
    replicas = cfg.cluster.roles["actor"].devices // trainer.tensor_parallel
    per_update = samples // trainer.updates_per_batch
    per_rank = math.ceil(per_update / replicas)
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    fit = max(1, trainer.max_tokens_per_rank // longest)
    return BatchPlan(
        prompts=cfg.rollout.prompts_per_step,
        samples=samples,
        updates=trainer.updates_per_batch * trainer.epochs_per_batch,
        samples_per_update=per_update,
        data_parallel=replicas,
        samples_per_rank=per_rank,
        tokens_per_rank=per_rank * longest,
        micro_batches=math.ceil(per_rank / fit),
    )


def memory_plan(cfg: SlimeConfig, batch: BatchPlan) -> MemoryPlan | None:
    """The formulas of this file's head, for the model in model.path."""
    config = model_config(cfg)
    if config is None:
        return None
    parameters, width = count_parameters(Path(cfg.model.path)), BYTES[cfg.model.dtype]
    share = parameters / cfg.trainer.tensor_parallel
    layers, hidden, heads = (_size(cfg, config, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens
    tokens = max(cfg.trainer.max_tokens_per_rank, longest)
    served = cfg.rollout.tensor_parallel
    in_flight = min(cfg.rollout.max_in_flight, batch.samples) / cfg.rollout.engines
    kv_per_token = 2 * layers * head_dim * width * math.ceil(kv_heads / served)
    return MemoryPlan(
        parameters=parameters,
        rank_weights=int(share * width),
        rank_gradients=int(share * 4),
        rank_optimizer=int(share * (12 if cfg.model.dtype == "bf16" else 8) / batch.data_parallel),
        rank_activations=17 * width * hidden * layers * tokens // cfg.trainer.tensor_parallel,
        engine_weights=parameters * width // served,
        engine_kv_per_token=kv_per_token,
        engine_kv_wanted=int(kv_per_token * math.ceil(in_flight) * longest),
    )


def _size(cfg: SlimeConfig, config: dict[str, Any], name: str) -> int:
    if not isinstance(config.get(name), int):
        raise ConfigError(f"model.path={cfg.model.path}: its config.json has no {name}")
    return config[name]


def count_parameters(model_dir: Path) -> int:
    """Elements of all tensors in a directory's safetensors, from their headers (8 bytes of length, then JSON)."""
    total = 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
