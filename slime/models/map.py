"""ModelMap: what megatron-core has to be told of a Hugging Face model, and where each of its tensors goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from typing import Any

from slime.layout import Layout, Move, Shape
from slime.models.parts.feed_forward import Groups
from slime.models.rope import Rope


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a mixture of experts sends a token: to `chosen` of `experts` in every one of `layers` (in dense ones to expert 0)."""

    layers: int
    chosen: int
    experts: int


@dataclass(frozen=True)
class ModelMap:
    """A model between Hugging Face and megatron-core. Parameter names are megatron-core's of the local (not Transformer Engine) layer
    spec, as on one rank without any parallelism: layers and experts carry their global numbers."""

    family: str
    hf_config: dict[str, Any]  # config.json as read
    transformer: dict[str, Any]  # values for megatron.core's (MLA)TransformerConfig, without parallel sizes and dtypes; functions by name
    gpt: dict[str, Any]  # keyword values for megatron.core.models.gpt.GPTModel; vocab_size is the padded one
    vocab_size: int  # rows of the HF embedding; logits of ids at and above it belong to padding and must be masked
    layouts: Mapping[str, Layout]  # parameter name -> its layout, in the order of the model's forward pass
    shared: Mapping[str, str]  # parameter that is a copy of another (tied output layer on the last pipeline stage) -> that other
    rope: Rope
    groups: Groups | None  # of experts that the router chooses within
    sandwich: bool  # norms after attention and after the MLP too
    unserved: str  # why SGLang cannot serve it, where that is so
    kept: tuple[str, ...]  # patterns of HF tensors that are carried along untrained (MTP heads)
    spare: tuple[str, ...]  # patterns of HF tensors that follow from the others or from config.json
    fresh: tuple[str, ...] = ()  # parameters that no checkpoint holds: they begin as 0 (the head of a critic)
    kept_shapes: Mapping[str, Shape] = field(default_factory=dict)  # those of `kept` that the checkpoint holds

    def parameters(self) -> dict[str, Layout]:
        """Every parameter (and buffer, a router's bias) that owns its HF tensors; exporting all of them writes each HF tensor once."""
        return dict(self.layouts)

    @cached_property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every trained tensor of the HF checkpoint, in the order of `parameters()`."""
        return {t.name: t.shape for layout in self.layouts.values() for t in layout.sources}

    @property
    def has_experts(self) -> bool:
        return "num_moe_experts" in self.transformer

    @property
    def routing(self) -> Routing | None:
        """None of a dense model."""
        if not self.has_experts:
            return None
        return Routing(*(self.transformer[name] for name in ("num_layers", "moe_router_topk", "num_moe_experts")))

    def layout(self, name: str) -> Layout:
        """The layout of a parameter, shared copies included. Raises ValueError for a name that the family does not have."""
        owner = self.shared.get(name, name)
        if owner not in self.layouts:
            raise ValueError(f"model.family={self.family}: megatron-core has a parameter {name!r} that the family's map does not place")
        return self.layouts[owner]

    def is_expert(self, name: str) -> bool:
        """Whether a parameter belongs to a routed expert, whose ranks are divided in their own way."""
        return ".mlp.experts." in name

    def is_router_bias(self, name: str) -> bool:
        """Whether it is the bias that a router chooses experts with: a buffer in fp32, not a parameter."""
        return name.endswith(".router.expert_bias")

    def moves(self, name: str, tp_rank: int, tp_size: int) -> tuple[Move, ...]:
        """The moves of one rank's shard of a parameter."""
        return self.layout(name).moves(tp_rank, tp_size)

    def local_shape(self, name: str, tp_size: int) -> Shape:
        """Shape of a rank's shard of a parameter."""
        return self.layout(name).local_shape(tp_size)


def padded_vocab(vocab: int, tp_size: int) -> int:
    """Rows of the embedding on all ranks together: `vocab` rounded up to a multiple of tp_size and of 128 (aligned matrix products on
    GPUs; 16 for a vocabulary below 8192, which padding would inflate). For the usual powers of two it does not depend on tp_size, so
    that a checkpoint keeps its shapes when it is resharded; Qwen3 and Llama 3 need no padding at all."""
    multiple = lcm(128 if vocab >= 8192 else 16, tp_size)
    return -(-vocab // multiple) * multiple
