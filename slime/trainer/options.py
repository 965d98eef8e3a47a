"""`trainer.megatron.<field>`: megatron-core's own options, by their own names, beside those that slime decides."""

import difflib
import types
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = {"model": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
NAMES = {kind: {f.name for f in fields(cls)} for kind, cls in KINDS.items()}
HINTS = {kind: get_type_hints(cls) for kind, cls in KINDS.items()}
ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization",
    "layernorm_epsilon", "qk_layernorm", "gated_linear_unit", "activation_func", "add_bias_linear", "add_qkv_bias",
)  # fmt: skip
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
    list: "a list",
    tuple: "a list",
}
# What slime sets itself, and the knob (or the reason) to name instead.
OWNED = {
    **dict.fromkeys(ARCHITECTURE, "config.json in model.path says it"),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), "it is 0, since log-probs of trainer and engines must agree"),
    "tensor_model_parallel_size": "use trainer.tensor_parallel",
    "sequence_parallel": "it is on whenever trainer.tensor_parallel > 1",
    "pipeline_model_parallel_size": "slime arranges tensor and data parallel ranks",
    "context_parallel_size": "slime arranges tensor and data parallel ranks",
    "expert_model_parallel_size": "slime arranges tensor and data parallel ranks",
    "params_dtype": "use model.dtype",
    "pipeline_dtype": "use model.dtype",
    "bf16": "use model.dtype=bf16",
    "fp16": "use model.dtype=bf16",
    "variable_seq_lengths": "rows are packed, their lengths vary",
    "calculate_per_token_loss": "losses are summed with the weights of algorithm.aggregation",
    "use_distributed_optimizer": "it is always on",
    "overlap_param_gather": "weights are read after every update",
    "overlap_param_gather_with_optimizer_step": "weights are read after every update",
    "use_megatron_fsdp": "slime trains with the distributed optimizer",
    "num_distributed_optimizer_instances": "slime trains with one distributed optimizer",
    "grad_reduce_in_fp32": "gradients always accumulate and are reduced in fp32",
    "average_in_collective": "gradients are sums, algorithm.aggregation weights them",
    "optimizer": "slime trains with Adam",
    "lr": "use trainer.lr",
    "min_lr": "use trainer.min_lr",
    "weight_decay": "use trainer.weight_decay",
    "adam_beta1": "use trainer.beta1",
    "adam_beta2": "use trainer.beta2",
    "adam_eps": "use trainer.eps",
    "clip_grad": "use trainer.clip_grad",
}


@dataclass(frozen=True)
class Options:
    """Values by the dataclass that takes them; a field that several have goes to each."""

    model: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]


def sort_options(megatron: dict[str, Any]) -> Options:
    """Hand `trainer.megatron` to megatron-core's dataclasses.

    Raises ValueError for a name that none of them has, with the nearest one that does; for one that slime decides, naming the knob; and
    for a value that is not of the field's type.
    """
    known = set().union(*NAMES.values())
    for name, value in megatron.items():
        if name in OWNED:
            raise ValueError(f"trainer.megatron.{name} is decided by slime: {OWNED[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known - OWNED.keys(), n=1)
            hint = f"; did you mean trainer.megatron.{near[0]}?" if near else ""
            raise ValueError(f"trainer.megatron.{name}: megatron-core has no such option{hint}")
        _check_type(name, value)
    return Options(**{kind: {k: v for k, v in megatron.items() if k in names} for kind, names in NAMES.items()})


def _check_type(name: str, value: Any) -> None:
    hint = next(hints[name] for hints in HINTS.values() if name in hints)
    takes = _takes(hint)
    if not takes:
        raise ValueError(f"trainer.megatron.{name} takes a Python object, which a recipe cannot hold")
    if not _fits(value, hint):
        raise ValueError(f"trainer.megatron.{name}={value}: takes {' or '.join(takes)}")


def _branches(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from yaml is of a field's type. A whole number is a number, true is not."""
    for branch in _branches(hint):
        if get_origin(branch) is Literal:
            fits = value in get_args(branch)
        elif branch is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        elif (get_origin(branch) or branch) in (list, tuple):
            items = [arg for arg in get_args(branch) if arg is not Ellipsis]
            fits = isinstance(value, list) and all(not items or any(_fits(item, kind) for kind in items) for item in value)
        else:
            fits = branch in WORDS and type(value) is branch
        if fits:
            return True
    return False


def _takes(hint: Any) -> list[str]:
    """What a recipe may write for a field, in words; empty where only Python objects fit."""
    words = []
    for branch in _branches(hint):
        if get_origin(branch) is Literal:
            words += [str(choice) for choice in get_args(branch)]
        elif (kind := get_origin(branch) or branch) in WORDS:
            words.append(WORDS[kind])
    return words if words != [WORDS[type(None)]] else []
