"""From a Hugging Face directory to a trainable megatron-core model on this rank."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from slime.config import SlimeConfig, TrainerConfig
from slime.models.hf_files import HFReader
from slime.models.map import ModelMap
from slime.models.registry import load_map
from slime.models.value import OUTPUT, value_map
from slime.trainer import blocks, fp32_head, names, rotary, routing
from slime.trainer.distributed import Parallel
from slime.trainer.options import Options, sort_options
from slime.trainer.spec import decoder_spec
from slime.trainer.value_head import ValueHead
from slime.trainer.without_te import allocate_adam_state

ACTIVATIONS = {"silu": F.silu}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Model:
    """This rank's shard of the model, wrapped for training, and its optimizer."""

    map: ModelMap
    config: TransformerConfig
    stages: list[DistributedDataParallel]  # around a GPTModel each; several with virtual pipeline stages
    optimizer: ChainedOptimizer
    narrow: dict[str, torch.dtype]  # HF tensors that are exported in their own dtype, not in the one they are held in

    @property
    def device(self) -> torch.device:
        return next(self.stages[0].parameters()).device

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's parameters by the map's names, in the model's order."""
        for stage in self.stages:
            yield from names.parameters(stage.module)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the map places on this rank: parameters, and the buffers that routers keep."""
        for stage in self.stages:
            yield from names.tensors(stage.module)

    def train(self, mode: bool) -> None:
        """Switch all stages between training and evaluation."""
        for stage in self.stages:
            stage.train(mode)


def build_model(cfg: SlimeConfig, parallel: Parallel) -> Model:
    """Build the model, fill it from model.path, add gradient buffers and the optimizer. All ranks call it together.

    Raises ValueError for a model directory or a trainer.megatron option that cannot be used.
    """
    return _build(load_map(cfg.model.path, cfg.model.family, parallel.tp.size()), cfg, parallel)


def build_value_model(cfg: SlimeConfig, parallel: Parallel) -> Model:
    """`build_model` for a model with one output a token, its value, in place of logits."""
    return _build(value_map(load_map(cfg.model.path, cfg.model.family, parallel.tp.size())), cfg, parallel)


def _build(model_map: ModelMap, cfg: SlimeConfig, parallel: Parallel) -> Model:
    options = sort_options(cfg.trainer.megatron)
    dtype = DTYPES[cfg.model.dtype]
    config, bare = build_stages(model_map, dtype, parallel, options, cfg.rollout.fp32_head)
    stages = [DistributedDataParallel(config, _ddp_config(options), gpt, disable_bucketing=n > 0) for n, gpt in enumerate(bare)]
    load_hf(bare, model_map, Path(cfg.model.path), parallel)
    optimizer = get_megatron_optimizer(_optimizer_config(cfg.trainer, dtype, options), stages)
    allocate_adam_state(optimizer)
    hooks = [stage.no_sync for stage in stages]
    config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    config.finalize_model_grads_func = _finalize_sums
    narrow = {} if config.moe_router_bias_update_rate else bias_dtypes(model_map, Path(cfg.model.path))
    model = Model(model_map, config, stages, optimizer, narrow)
    model.train(True)
    return model


def build_stages(
    model_map: ModelMap, dtype: torch.dtype, parallel: Parallel, options: Options, wide_head: bool = False
) -> tuple[TransformerConfig, list[GPTModel]]:
    """This rank's pipeline stages, their weights still unset, without gradient buffers; with `wide_head` logits are fp32. All ranks call
    it together."""
    config = _transformer_config(model_map, dtype, parallel, options)
    return config, [_stage(config, model_map, parallel, number, wide_head) for number in range(parallel.sizes.virtual)]


def _stage(config: TransformerConfig, model_map: ModelMap, parallel: Parallel, number: int, wide_head: bool) -> GPTModel:
    """One pipeline stage of this rank, its weights still unset."""
    virtual = number if parallel.sizes.virtual > 1 else None
    gpt = GPTModel(
        config,
        decoder_spec(config, model_map.sandwich, virtual),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, vp_stage=virtual),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, vp_stage=virtual),
        parallel_output=True,
        vp_stage=virtual,
        **model_map.gpt,
    )
    if gpt.post_process and OUTPUT in model_map.fresh:
        gpt.output_layer = ValueHead(config)
    elif gpt.post_process and wide_head:
        fp32_head.install(gpt)
    rotary.install(gpt, model_map.rope)
    routing.install(gpt, model_map.groups)
    return gpt


def _leave(weight: torch.Tensor) -> None:
    """An initialisation that does nothing."""


def _transformer_config(model_map: ModelMap, dtype: torch.dtype, parallel: Parallel, options: Options) -> TransformerConfig:
    sizes = parallel.sizes
    ours = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": sizes.tensor,
        "sequence_parallel": sizes.sequence,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual if sizes.virtual > 1 else None,
        "context_parallel_size": sizes.context,
        "expert_model_parallel_size": sizes.expert if model_map.has_experts else 1,  # a teacher may be without
        "expert_tensor_parallel_size": sizes.expert_tensor if model_map.has_experts else sizes.tensor,
        "variable_seq_lengths": sizes.virtual == 1,  # rows are packed; between interleaved stages their shapes could not be told apart
        "overlap_p2p_comm": sizes.virtual > 1,
        "batch_p2p_comm": sizes.virtual == 1,
        "batch_p2p_sync": False,
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths demands it, of dense models too
        "calculate_per_token_loss": True,  # no division by micro-batches or ranks
        # Weights come from model.path. Switching perform_initialization off instead would also leave shards unmarked, and the gradient's
        # norm would then count those of the first tensor-parallel rank only.
        "activation_func": ACTIVATIONS[model_map.transformer["activation_func"]],
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave),
    }
    kind = MLATransformerConfig if "multi_latent_attention" in model_map.transformer else TransformerConfig
    return kind(**{**model_map.transformer, **options.model, **ours})


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


def bias_dtypes(model_map: ModelMap, path: Path) -> dict[str, torch.dtype]:
    """The biases that routers choose with, by HF name: they are held in fp32 and, unless they are updated, go back in the dtype that they
    have in the model's directory, which this is."""
    biases = [layout for name, layout in model_map.layouts.items() if model_map.is_router_bias(name)]
    with HFReader(path) as reader:
        return {tensor.name: reader.dtype(tensor.name) for layout in biases for tensor in layout.sources}


@torch.no_grad()
def load_hf(
    stages: list[GPTModel], model_map: ModelMap, path: Path, parallel: Parallel, loaded: Callable[[str], None] = lambda name: None
) -> None:
    """Fill this rank's parameters from the slices of the checkpoint that they are made of; padding rows become 0. `loaded` is told the
    name of each one that is filled."""
    with HFReader(path) as reader:
        for stage in stages:
            for name, tensor in names.tensors(stage):
                group = parallel.etp if model_map.is_expert(name) else parallel.tp
                expected = model_map.local_shape(name, group.size())
                assert tensor.shape == expected, f"{name}: megatron-core built {tuple(tensor.shape)}, the map says {expected}"
                if name in model_map.fresh:
                    tensor.zero_()
                else:
                    blocks.load(model_map.moves(name, group.rank(), group.size()), reader.read_block, tensor)
                loaded(name)
