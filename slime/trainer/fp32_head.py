"""Logits in fp32 of a model in bf16, where engines compute theirs so (rollout.sglang.enable_fp32_lm_head)."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


def install(gpt: GPTModel) -> None:
    """From now on the output layer multiplies in fp32; its weight stays as it is, and its gradient is summed as before."""
    gpt.output_layer.register_forward_pre_hook(_widened, with_kwargs=True)


def _widened(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Of hidden states and weight (a tied one comes with the call) fp32 copies."""
    weight = kwargs.get("weight")
    return tuple(hidden.float() for hidden in args), {**kwargs, "weight": (layer.weight if weight is None else weight).float()}
