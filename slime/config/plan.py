"""What a recipe will occupy, by arithmetic alone: devices by role, the batch, memory of a rank and of an engine.

Memory of a rank, in bytes a parameter of its tensor-parallel share, for the distributed optimizer over `d` data-parallel ranks
(megatron-core, "Distributed Optimizer": theoretical memory):

    bf16    2 parameter + 4 gradient (fp32) + (4 main parameter + 8 Adam moments) / d
    fp32    4 parameter + 4 gradient        +  8 Adam moments / d

Activations of one micro-batch: 34 x hidden x layers bytes a token in bf16, twice that in fp32, over the tensor-parallel ranks
(Korthikanti et al. 2022, equation 2 without attention scores, which are never stored); an estimate, recomputation lowers it.

Logits of one micro-batch and their gradient: 2 x tokens x vocabulary / tensor-parallel ranks, in the model's dtype. Log-probs are
computed from them in fp32, a chunk of at most 2^24 values at a time; the backward pass holds at most five such chunks.

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
from slime.config.roles import RoleNeed, role_needs, samples_per_prompt

BYTES = {"bf16": 2, "fp32": 4}
CHUNK_ELEMENTS = 1 << 24  # of slime.trainer.logprobs
CHUNKS = 5  # fp32 arrays of a chunk alive at once in its backward pass: logits, probabilities, their gradient, two intermediate results


@dataclass(frozen=True)
class UpdatePlan:
    """One update in numbers, where the recipe trains. Token counts take every prompt and answer as long as allowed."""

    optimizer_steps: int  # on one batch
    samples: int  # in one optimizer step
    data_parallel: int
    samples_per_rank: int  # in one optimizer step, about: work is balanced by tokens
    tokens_per_rank: int  # of that many samples
    micro_batches: int  # of that many samples


@dataclass(frozen=True)
class BatchPlan:
    """One step in numbers. `update` is None with run.only=rollout."""

    prompts: int
    samples: int  # of all prompts
    update: UpdatePlan | None


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device of the trainer."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int  # with their gradient
    logprobs: int  # fp32 chunks

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.logprobs


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one device of an engine."""

    weights: int
    kv_per_token: int
    kv_wanted: int  # for every request that may be in flight, at full length


@dataclass(frozen=True)
class MemoryPlan:
    """`rank` is None where the recipe starts no trainer, `engine` where it starts no engine."""

    parameters: int  # of the whole model
    rank: RankMemory | None
    engine: EngineMemory | None


@dataclass(frozen=True)
class Plan:
    """The resource plan of a recipe. `memory` is None for a model that is still on the hub."""

    roles: dict[str, RoleNeed]
    batch: BatchPlan
    memory: MemoryPlan | None


def plan(cfg: SlimeConfig) -> Plan:
    """The plan of a checked recipe; reads the model's config.json and the headers of its safetensors."""
    roles = role_needs(cfg)
    batch = batch_plan(cfg, roles)
    return Plan(roles, batch, memory_plan(cfg, roles, batch))


def longest(cfg: SlimeConfig) -> int:
    """Tokens of the longest prompt with the longest answer."""
    return cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens


def batch_plan(cfg: SlimeConfig, roles: dict[str, RoleNeed]) -> BatchPlan:
    """Prompts x samples, divided into optimizer steps, ranks and micro-batches."""
    prompts = cfg.rollout.prompts_per_step
    samples = prompts * samples_per_prompt(cfg)
    return BatchPlan(prompts, samples, update_plan(cfg, samples, roles["actor"].devices) if "actor" in roles else None)


def update_plan(cfg: SlimeConfig, samples: int, devices: int) -> UpdatePlan:
    """A batch of `samples` over the actor's devices."""
    trainer = cfg.trainer
    replicas = devices // trainer.tensor_parallel
    per_step = samples // trainer.updates_per_batch
    per_rank = math.ceil(per_step / replicas)
    fit = max(1, trainer.max_tokens_per_rank // longest(cfg))
    return UpdatePlan(
        optimizer_steps=trainer.updates_per_batch * trainer.epochs_per_batch,
        samples=per_step,
        data_parallel=replicas,
        samples_per_rank=per_rank,
        tokens_per_rank=per_rank * longest(cfg),
        micro_batches=math.ceil(per_rank / fit),
    )


def memory_plan(cfg: SlimeConfig, roles: dict[str, RoleNeed], batch: BatchPlan) -> MemoryPlan | None:
    """The formulas of this file's head, for the model in model.path."""
    config = model_config(cfg)
    if config is None:
        return None
    parameters = count_parameters(Path(cfg.model.path))
    rank = rank_memory(cfg, config, parameters, batch.update.data_parallel) if batch.update else None
    return MemoryPlan(parameters, rank, engine_memory(cfg, config, parameters, batch.samples) if "rollout" in roles else None)


def rank_memory(cfg: SlimeConfig, config: dict[str, Any], parameters: int, data_parallel: int) -> RankMemory:
    width, ranks = BYTES[cfg.model.dtype], cfg.trainer.tensor_parallel
    share = parameters / ranks
    layers, hidden, vocab = (_size(cfg, config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    tokens = max(cfg.trainer.max_tokens_per_rank, longest(cfg))
    columns = math.ceil(vocab / ranks)
    chunk = min(tokens, max(1, CHUNK_ELEMENTS // columns)) * columns
    return RankMemory(
        weights=int(share * width),
        gradients=int(share * 4),
        optimizer=int(share * (12 if cfg.model.dtype == "bf16" else 8) / data_parallel),
        activations=17 * width * hidden * layers * tokens // ranks,
        logits=2 * width * columns * tokens,
        logprobs=CHUNKS * 4 * chunk,
    )


def engine_memory(cfg: SlimeConfig, config: dict[str, Any], parameters: int, samples: int) -> EngineMemory:
    width, served = BYTES[cfg.model.dtype], cfg.rollout.tensor_parallel
    layers, hidden, heads = (_size(cfg, config, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    in_flight = min(cfg.rollout.max_in_flight, samples) / cfg.rollout.engines
    kv_per_token = 2 * layers * head_dim * width * math.ceil(kv_heads / served)
    return EngineMemory(parameters * width // served, kv_per_token, kv_per_token * math.ceil(in_flight) * longest(cfg))


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
