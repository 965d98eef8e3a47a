"""Memory of a rank and of an engine, by arithmetic on config.json, the headers of the safetensors and the parallel sizes.

A rank of pipeline stage s holds, of the parameters of its layers (which are taken to be alike), of the embedding on the first stage and
of the output layer on the last (tied: a copy of the embedding), 1 / tensor; of its layers' experts, 1 / (expert x expert_tensor). The
stage that takes the most is reported. In bytes a parameter held, for the distributed optimizer over `d` ranks that hold the same (data x
context; for experts, expert data parallel), after megatron-core's "Distributed Optimizer", theoretical memory:

    bf16    2 parameter + 4 gradient (fp32) + (4 main parameter + 8 Adam moments) / d
    fp32    4 parameter + 4 gradient        +  8 Adam moments / d

Activations of a layer and token, in bytes in bf16, twice that in fp32, t tensor-parallel ranks (Korthikanti et al. 2022, arXiv:2205.05198,
section 4, without attention scores, which are never stored); an estimate, recomputation lowers it:

    34 x hidden / t                    dense, split along the sequence; (10 + 24 / t) x hidden where it is not
    (15 x hidden + 2 x (k x (2 x e x hidden + 3 x inner) + 3 x shared)) / t
                                       with experts: k of width `inner` a token, evenly chosen, each split e-fold, beside shared ones
    + 2 x (context - 1) x kv / t       with context parallelism: keys and values (kv values a token) of the row's other ranks

A rank has at most max_tokens_per_rank tokens of a micro-batch, or its 1 / context of one longer sequence. Of p stages, stage s holds
p - s micro-batches at once (one-forward-one-backward); v-fold interleaved, (2 (p - s - 1) + (v - 1) p + 1) / v (ibid., appendix C).

Logits of one micro-batch and their gradient, on the last stage: 2 x tokens x vocabulary / t, in the model's dtype or in fp32
(rollout.sglang.enable_fp32_lm_head). With a divergence as a
loss (algorithm.distill=topk or full) its gradient is one more, and with full the teacher's logits are there too. Log-probs are computed
from logits in fp32, a chunk of at most 2^24 values at a time; the backward pass holds at most three such chunks.

A critic has a head of one output in place of the output layer, and no logits. On the actor's ranks it adds its parameters, gradients and
optimizer state; its activations are never there together with the actor's, which are taken to be as large. The reference of a KL and every
teacher that the actor's ranks hold add their parameters, in the actor's layout; they keep no activations. With sync.snapshot=device the
weights that engines have lie beside the model, divided over the ranks that hold the same parameters.

An engine's device holds its share of the weights (with rollout.quantization=fp8 a byte for all but embedding and head) and, a token and
layer, 2 x kv_heads x head_dim values of KV cache over its tensor-parallel ranks; with latent attention kv_lora_rank + qk_rope_head_dim
values, on every rank.
"""

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.parallel import ParallelSizes, parallel_sizes, stage_layers

BYTES = {"bf16": 2, "fp32": 4}
ADAM_BYTES = {"bf16": 12, "fp32": 8}
CHUNK_ELEMENTS = 1 << 24  # of slime.trainer.kernels.vocabulary_chunks
CHUNKS = 3  # arrays of a chunk alive at once in its backward pass, as large as fp32: two for the arithmetic, one that is read or written
LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Parameters:
    """Elements of a model's tensors by what divides them. Heads that predict further tokens, neither trained nor served, are left out."""

    embedding: int
    output: int  # 0 where it is tied to the embedding
    experts: int  # routed ones
    others: int
    sparse_layers: int  # layers with experts

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.output + self.experts + self.others


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device of the trainer."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the micro-batches in flight
    logits: int  # with their gradient
    logprobs: int  # fp32 chunks
    stage: int  # its pipeline stage, from 0
    critic: int = 0  # weights, gradients and optimizer state of a critic that it holds beside
    frozen: int = 0  # weights of the reference and of teachers
    snapshot: int = 0  # of the weights that engines have

    @property
    def total(self) -> int:
        """All of it."""
        return self.held + self.critic + self.frozen + self.snapshot + self.activations + self.logits + self.logprobs

    @property
    def held(self) -> int:
        """Of the model and its optimizer."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one device of an engine."""

    weights: int
    kv_per_token: int
    kv_wanted: int  # for every request that may be in flight, at full length


def longest(cfg: SlimeConfig) -> int:
    """Tokens of the longest prompt with the longest answer."""
    return cfg.data.max_prompt_tokens + cfg.rollout.max_response_tokens


def count_parameters(model_dir: Path, config: dict[str, Any]) -> Parameters:
    """The tensors of a directory's safetensors, by their headers; `config` is its config.json."""
    layers, found, sparse = config.get("num_hidden_layers"), dict.fromkeys(("embedding", "output", "experts", "others"), 0), set()
    for name, elements in _tensors(model_dir):
        layer = LAYER.match(name)
        further = layer is not None and isinstance(layers, int) and int(layer[1]) >= layers
        if further or (name == OUTPUT and config.get("tie_word_embeddings")):
            continue
        kind = {EMBEDDING: "embedding", OUTPUT: "output"}.get(name, "experts" if ".experts." in name else "others")
        found[kind] += elements
        if kind == "experts":
            sparse.add(name.partition(".experts.")[0])
    return Parameters(**found, sparse_layers=len(sparse))


def _tensors(model_dir: Path) -> Iterator[tuple[str, int]]:
    """Name and number of elements of every tensor: a file begins with 8 bytes of length, then JSON."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        yield from ((name, math.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


@dataclass(frozen=True)
class Model:
    """What is trained on a number of devices."""

    config: dict[str, Any]  # its config.json
    parameters: Parameters
    devices: int
    logits: bool = True  # False: a critic

    @classmethod
    def critic(cls, cfg: SlimeConfig, config: dict[str, Any], parameters: Parameters, devices: int) -> "Model":
        """From the model that a critic begins as, with its head."""
        return cls(config, replace(parameters, output=size_of(cfg, config, "hidden_size")), devices, logits=False)


@dataclass(frozen=True)
class Beside:
    """What ranks hold beside the model that they train."""

    critic: Model | None = None
    reference: Model | None = None
    teachers: tuple[Model, ...] = ()
    snapshot: bool = False  # of the weights that engines have, on the device

    @property
    def frozen(self) -> tuple[Model, ...]:
        """The reference and the teachers."""
        return self.teachers if self.reference is None else (self.reference, *self.teachers)


def rank_memory(cfg: SlimeConfig, model: Model, micro_batches: int, beside: Beside = Beside()) -> RankMemory:
    """What a rank of the largest pipeline stage holds, with what lies beside its model. Raises ConfigError for layers that do not divide
    into stages."""
    stages = _of_stages(cfg, model, micro_batches)
    if beside.snapshot:  # of every element as many bytes as its weight, and optimizer state is divided alike
        width = ADAM_BYTES[cfg.model.dtype] // BYTES[cfg.model.dtype]
        stages = [replace(memory, snapshot=memory.optimizer // width) for memory in stages]
    if cfg.algorithm.distill in ("topk", "full"):
        stages = [replace(memory, logits=memory.logits // 2 * 3) for memory in stages]
    if beside.critic is not None:
        others = _of_stages(cfg, beside.critic, micro_batches)
        stages = [replace(memory, critic=other.held) for memory, other in zip(stages, others, strict=True)]
    for frozen in beside.frozen:
        others = _of_stages(cfg, frozen, micro_batches)
        stages = [replace(memory, frozen=memory.frozen + other.weights) for memory, other in zip(stages, others, strict=True)]
    if beside.teachers and cfg.algorithm.distill == "full":
        widest = max(_of_stages(cfg, teacher, micro_batches)[-1].logits // 2 for teacher in beside.teachers)
        stages[-1] = replace(stages[-1], logits=stages[-1].logits + widest)
    return max(stages, key=lambda memory: memory.total)


def _of_stages(cfg: SlimeConfig, model: Model, micro_batches: int) -> list[RankMemory]:
    layers = stage_layers(size_of(cfg, model.config, "num_hidden_layers"), cfg.trainer)
    return [_stage_memory(cfg, model, micro_batches, layers, stage) for stage in range(len(layers))]


def _stage_memory(cfg: SlimeConfig, model: Model, micro_batches: int, layers: list[int], stage: int) -> RankMemory:
    config, parameters, devices = model.config, model.parameters, model.devices
    sizes, width = parallel_sizes(cfg.trainer), BYTES[cfg.model.dtype]
    part, is_first, is_last = layers[stage] / sum(layers), stage == 0, stage == len(layers) - 1
    output = parameters.output or (0 if is_first else parameters.embedding)
    plain = (parameters.others * part + parameters.embedding * is_first + output * is_last) / sizes.tensor
    experts = parameters.experts * part / (sizes.expert * sizes.expert_tensor)
    optimizer = plain / (sizes.data(devices) * sizes.context) + experts / sizes.expert_data(devices)
    tokens = max(cfg.trainer.max_tokens_per_rank, math.ceil(longest(cfg) / sizes.context))
    columns = math.ceil(size_of(cfg, config, "vocab_size") / sizes.tensor) if model.logits else 0
    held = tokens * layers[stage] * _in_flight(sizes, stage, micro_batches)
    return RankMemory(
        weights=int((plain + experts) * width),
        gradients=int((plain + experts) * 4),
        optimizer=int(optimizer * ADAM_BYTES[cfg.model.dtype]),
        activations=int(_activations(cfg, config, sizes, parameters.sparse_layers / sum(layers)) * width / 2 * held),
        logits=2 * (4 if cfg.rollout.fp32_head else width) * columns * tokens * is_last,
        logprobs=CHUNKS * 4 * min(tokens, max(1, CHUNK_ELEMENTS // max(1, columns))) * columns * is_last,
        stage=stage,
    )


def _in_flight(sizes: ParallelSizes, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once."""
    if sizes.virtual == 1:
        return min(sizes.pipeline - stage, micro_batches)
    chunks = 2 * (sizes.pipeline - stage - 1) + (sizes.virtual - 1) * sizes.pipeline + 1
    return min(chunks / sizes.virtual, micro_batches)


def _activations(cfg: SlimeConfig, config: dict[str, Any], sizes: ParallelSizes, sparse: float) -> float:
    """Bytes in bf16 of a token in a layer, on average; `sparse` is the fraction of layers with experts."""
    hidden, ranks = size_of(cfg, config, "hidden_size"), sizes.tensor
    dense = 34 * hidden / ranks if sizes.sequence else (10 + 24 / ranks) * hidden
    gathered = 2 * (sizes.context - 1) * _key_value_channels(cfg, config) / ranks if sizes.context > 1 else 0
    if not sparse:
        return dense + gathered
    chosen, inner = size_of(cfg, config, "num_experts_per_tok"), config.get("moe_intermediate_size")
    inner = inner if isinstance(inner, int) else size_of(cfg, config, "intermediate_size")
    shared = (config.get("n_shared_experts") or 0) * inner
    routed = chosen * (2 * sizes.expert_tensor * hidden + 3 * inner)
    return (1 - sparse) * dense + sparse * (15 * hidden + 2 * (routed + 3 * shared)) / ranks + gathered


def _key_value_channels(cfg: SlimeConfig, config: dict[str, Any]) -> int:
    """Keys and values of a token in a layer, as attention computes with them."""
    if "kv_lora_rank" not in config:
        return 2 * math.prod(_key_value_heads(cfg, config))
    head = sum(size_of(cfg, config, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return size_of(cfg, config, "num_attention_heads") * head


def _key_value_heads(cfg: SlimeConfig, config: dict[str, Any]) -> tuple[int, int]:
    """Heads of keys and of values, and the width of one."""
    hidden, heads = size_of(cfg, config, "hidden_size"), size_of(cfg, config, "num_attention_heads")
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads


def engine_memory(cfg: SlimeConfig, config: dict[str, Any], parameters: int, samples: int) -> EngineMemory:
    """What a device of an engine holds, with `samples` of a batch asked of all engines."""
    in_flight = min(cfg.rollout.max_in_flight, samples) / cfg.rollout.engines
    kv_per_token = kv_bytes_per_token(cfg, config)
    held = parameters * BYTES[cfg.model.dtype]
    if cfg.rollout.quantization == "fp8":  # norms and scales hardly count
        tables = 1 if config.get("tie_word_embeddings") else 2
        held = parameters + tables * size_of(cfg, config, "vocab_size") * size_of(cfg, config, "hidden_size")
    return EngineMemory(held // cfg.rollout.tensor_parallel, kv_per_token, kv_per_token * math.ceil(in_flight) * longest(cfg))


def kv_bytes_per_token(cfg: SlimeConfig, config: dict[str, Any]) -> int:
    """What an engine keeps of a token in all layers, on one device: keys and values of its heads, or the latent of all heads."""
    if config.get("kv_lora_rank"):
        values = size_of(cfg, config, "kv_lora_rank") + size_of(cfg, config, "qk_rope_head_dim")
    else:
        heads, head_dim = _key_value_heads(cfg, config)
        values = 2 * head_dim * math.ceil(heads / cfg.rollout.tensor_parallel)
    return size_of(cfg, config, "num_hidden_layers") * values * BYTES[cfg.model.dtype]


def size_of(cfg: SlimeConfig, config: dict[str, Any], name: str) -> int:
    """A whole number of config.json. Raises ConfigError where there is none."""
    if not isinstance(config.get(name), int):
        raise ConfigError(f"model.path={cfg.model.path}: its config.json has no {name}")
    return config[name]
