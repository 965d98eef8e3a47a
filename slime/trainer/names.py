"""The map's names of what a megatron-core model holds: layers and experts carry their numbers in the whole model, not in the rank."""

import re
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from slime.trainer.routing import ExpertLayer

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def parameters(gpt: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a stage, in the model's order."""
    for name, parameter in gpt.named_parameters():
        yield _global(gpt, name), parameter


def tensors(gpt: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a stage, and the biases that routers choose with: fp32 buffers, which no optimizer updates."""
    yield from parameters(gpt)
    for local, layer in enumerate(gpt.decoder.layers):
        if isinstance(layer, ExpertLayer) and layer.mlp.router.expert_bias is not None:
            yield _global(gpt, f"decoder.layers.{local}.mlp.router.expert_bias"), layer.mlp.router.expert_bias


def _global(gpt: GPTModel, name: str) -> str:
    found = LAYER.match(name)
    if found is None:
        return name
    layer = gpt.decoder.layers[int(found[1])]
    name = f"decoder.layers.{layer.layer_number - 1}.{name[found.end() :]}"
    if isinstance(layer, ExpertLayer):
        experts = layer.mlp.local_expert_indices
        name = EXPERT.sub(lambda expert: f".local_experts.{experts[int(expert[1])]}.", name)
    return name
