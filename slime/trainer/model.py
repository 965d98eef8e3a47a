"""From a Hugging Face directory to a trainable megatron-core model on this rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.config import SlimeConfig, TrainerConfig
from slime.models.hf_files import HFReader
from slime.models.map import ModelMap
from slime.models.registry import load_map
from slime.trainer import blocks
from slime.trainer.distributed import Parallel
from slime.trainer.options import Options, sort_options
from slime.trainer.spec import decoder_spec
from slime.trainer.without_te import allocate_adam_state

ACTIVATIONS = {"silu": F.silu}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Model:
    """This rank's shard of the model, wrapped for training, and its optimizer."""

    map: ModelMap
    config: TransformerConfig
    gpt: GPTModel
    ddp: DistributedDataParallel  # around gpt
    optimizer: ChainedOptimizer
    forward_options: dict[str, Any]  # further keyword arguments of ddp's forward

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters by the map's names, in the model's order."""
        yield from self.gpt.named_parameters()


def build_model(cfg: SlimeConfig, parallel: Parallel) -> Model:
    """Build the model, fill it from model.path, add gradient buffers and the optimizer. All ranks call it together.

    Raises ValueError for a model directory or a trainer.megatron option that cannot be used.
    """
    options = sort_options(cfg.trainer.megatron)
    tp_size = parallel.tp.size()
    model_map = load_map(cfg.model.path, cfg.model.family, tp_size)
    dtype = DTYPES[cfg.model.dtype]
    config = _transformer_config(model_map, dtype, tp_size, options)
    gpt = GPTModel(
        config,
        decoder_spec(config),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        **model_map.gpt,
    )
    load_hf(gpt, model_map, Path(cfg.model.path), parallel.tp.rank(), tp_size)
    half = dtype == torch.bfloat16
    ddp = DistributedDataParallel(config, _ddp_config(options), Float16Module(config, gpt) if half else gpt)
    optimizer = get_megatron_optimizer(_optimizer_config(cfg.trainer, dtype, options), [ddp])
    allocate_adam_state(optimizer)
    config.no_sync_func = ddp.no_sync
    config.finalize_model_grads_func = _finalize_sums
    ddp.train()
    keep_dtype = {"fp32_output": False} if half else {}  # fp32 logits live a chunk at a time, see logprobs.py
    return Model(model_map, config, gpt, ddp, optimizer, keep_dtype)


def _leave(weight: torch.Tensor) -> None:
    """An initialisation that does nothing."""


def _transformer_config(model_map: ModelMap, dtype: torch.dtype, tp_size: int, options: Options) -> TransformerConfig:
    ours = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": tp_size,
        "sequence_parallel": tp_size > 1,
        "variable_seq_lengths": True,  # rows are packed
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths demands it, of dense models too
        "batch_p2p_sync": False,
        "calculate_per_token_loss": True,  # no division by micro-batches or ranks
        # Weights come from model.path. Switching perform_initialization off instead would also leave shards unmarked, and the gradient's
        # norm would then count those of the first tensor-parallel rank only.
        "activation_func": ACTIVATIONS[model_map.transformer["activation_func"]],
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave),
    }
    return TransformerConfig(**{**model_map.transformer, **ours, **options.model})


def _ddp_config(options: Options) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(**{"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, **options.ddp})


def _optimizer_config(trainer: TrainerConfig, dtype: torch.dtype, options: Options) -> OptimizerConfig:
    """Weight decay is not applied to one-dimensional parameters (norms, biases): megatron-core's own default."""
    ours = {
        "optimizer": "adam",
        "lr": trainer.lr,
        "weight_decay": trainer.weight_decay,
        "adam_beta1": trainer.beta1,
        "adam_beta2": trainer.beta2,
        "adam_eps": trainer.eps,
        "clip_grad": trainer.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
    }
    return OptimizerConfig(**{**ours, **options.optimizer})


def _finalize_sums(model: list[Any], num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
    """Reduce gradients over ranks and divide them by nothing: the loss is a weighted sum over the whole update."""
    finalize_model_grads(model, None, **groups)


@torch.no_grad()
def load_hf(gpt: GPTModel, model_map: ModelMap, path: Path, tp_rank: int, tp_size: int) -> None:
    """Fill this rank's parameters from the slices of the checkpoint that they are made of; padding rows become 0."""
    with HFReader(path) as reader:
        for name, parameter in gpt.named_parameters():
            moves = model_map.moves(name, tp_rank, tp_size)
            expected = model_map.local_shape(name, tp_size)
            assert parameter.shape == expected, f"{name}: megatron-core built {tuple(parameter.shape)}, the map says {expected}"
            blocks.load(moves, reader.read_block, parameter)
