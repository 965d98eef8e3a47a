"""`trainer.megatron.<field>`: megatron-core's performance options, by their own names.

Every field of megatron-core's three dataclasses is in one of the tables below: taken, decided by slime, or without effect here. They are
those of megatron-core 0.16; a field that another version adds is refused until somebody has looked at it.
"""

import difflib
import types
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = {"model": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
NAMES = {kind: {f.name for f in fields(cls)} for kind, cls in KINDS.items()}
HINTS = {kind: get_type_hints(cls) for kind, cls in KINDS.items()}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
    list: "a list",
    tuple: "a list",
}

TAKEN = (
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion", "clone_scatter_output_in_embedding",
    "disable_bf16_reduced_precision_matmul", "deterministic_mode",
    "overlap_grad_reduce", "bucket_size", "pad_buckets_for_high_nccl_busbw", "nccl_ub", "disable_symmetric_registration",
    "check_for_nan_in_grad", "check_for_large_grads", "apply_wd_to_qk_layernorm",
    "sequence_parallel", "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "moe_router_bias_update_rate",
)  # fmt: skip

# What slime sets itself: the reason, or the knob to name instead -> fields (* stands for the rest of a name).
DECIDED = {
    "config.json in model.path says it": """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization layernorm_epsilon
        layernorm_zero_centered_gamma apply_residual_connection_post_layernorm qk_layernorm qk_l2_norm gated_linear_unit activation_func
        activation_func_clamp_value glu_linear_offset use_fused_weighted_squared_relu add_bias_linear add_qkv_bias softmax_scale
        softmax_type attention_output_gate window_size window_attn_skip_freq rotary_interleaved mrope_section no_rope_freq
        multi_latent_attention experimental_attention_variant dsa_* linear_* is_hybrid_model mamba_* use_mamba_mem_eff_path mtp_*
        heterogeneous_block_specs hetereogenous_dist_checkpoint num_moe_experts moe_ffn_hidden_size moe_layer_freq moe_latent_size
        moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_num_groups moe_router_group_topk
        moe_router_topk_limited_devices moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function
        moe_router_enable_expert_bias moe_apply_probs_on_input""",
    "the experts are those that the engine chose, see rollout.replay_experts": """
        moe_enable_routing_replay moe_router_force_load_balancing moe_input_jitter_eps""",
    "engines drop no tokens, and log-probs must agree": """
        moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy""",
    "balancing losses would change what algorithm.name minimises": """
        moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_per_layer_logging""",
    "routers compute in fp32": "moe_router_dtype",
    "tokens go to experts by all-to-all": """
        moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_deepep_num_sms moe_hybridep_num_sms""",
    "it is 0, since log-probs of trainer and engines must agree": "attention_dropout hidden_dropout",
    "engines add residuals in model.dtype, and log-probs must agree": "fp32_residual_connection",
    "use trainer.tensor_parallel": "tensor_model_parallel_size",
    "use trainer.pipeline_parallel": "pipeline_model_parallel_size",
    "use trainer.context_parallel": "context_parallel_size",
    "use trainer.expert_parallel": "expert_model_parallel_size",
    "stages are divided evenly, but for num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage": """
        pipeline_model_parallel_layout pipeline_model_parallel_comm_backend microbatch_group_size_per_vp_stage""",
    "interleaved stages overlap their exchanges, others do not": "overlap_p2p_comm batch_p2p_comm",
    "keys and values are gathered from all context-parallel ranks": """
        hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank cp_comm_type""",
    "use model.dtype": "params_dtype pipeline_dtype bf16 fp16 enable_autocast autocast_dtype",
    "rows are packed, their lengths vary": "variable_seq_lengths *cuda_graph*",
    "weights come from model.path": "perform_initialization use_cpu_initialization *init_method* init_model_with_meta_device",
    "layers are megatron-core's local ones": "transformer_impl use_kitchen* kitchen_attention_backend",
    "attention is slime's own, over packed rows": "attention_backend",
    "losses are summed with the weights of algorithm.aggregation": "calculate_per_token_loss average_in_collective",
    "gradients accumulate and are reduced in fp32": "grad_reduce_in_fp32 reduce_scatter_with_fp32_accumulation main_grads_dtype",
    "slime trains with one distributed optimizer, and no FSDP": """
        use_distributed_optimizer num_distributed_optimizer_instances use_megatron_fsdp use_custom_fsdp fsdp_* *_sharding_strategy
        gradient_reduce_div_fusion suggested_communication_unit_size preserve_fp32_weights keep_fp8_transpose_cache""",
    "weights are read after every update": "overlap_param_gather* align_param_gather",
    "slime trains with Adam, its weight decay decoupled": "optimizer sgd_momentum muon_* decoupled_weight_decay",
    "Adam's state is kept and saved on the device": """
        optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_*""",
    "use trainer.lr, which all parameters share": "lr decoupled_lr",
    "use trainer.min_lr": "min_lr decoupled_min_lr",
    "use trainer.weight_decay": "weight_decay",
    "use trainer.beta1": "adam_beta1",
    "use trainer.beta2": "adam_beta2",
    "use trainer.eps": "adam_eps",
    "use trainer.clip_grad": "clip_grad",
    "the recipe is in the run's config.yaml": "config_logger_dir",
}

# What would do nothing in this trainer: why -> fields.
INERT = {
    "it is Transformer Engine's, whose layers slime does not use": """
        tp_comm_* fp8* fp4* activation_func_fp8_input_store first_last_layers_bf16 num_layers_at_*_in_bf16 tp_only_amax_red quant_recipe
        reuse_grad_buf_for_mxfp8_param_ag use_te_* disable_parameter_transpose_cache delay_wgrad_compute symmetric_ar_type cpu_offloading*
        _cpu_offloading_context fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        use_precision_aware_optimizer store_param_remainders main_params_dtype exp_avg*_dtype""",
    "attention is slime's own, over packed rows": """
        masked_softmax_fusion attention_softmax_in_fp32 apply_query_key_layer_scaling batch_invariant_mode qk_clip* log_max_attention_logit
        apply_rope_fusion fused_single_qkv_rope""",
    "the norm is torch's": "persist_layer_norm memory_efficient_layer_norm",
    "log-probs are slime's own": "cross_entropy_*",
    "activations are split along the sequence where trainer.tensor_parallel > 1": "distribute_saved_activations",
    "it saves nothing where stages exchange packed rows": """
        overlap_p2p_comm_warmup_flush batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs defer_embedding_wgrad_compute
        wgrad_deferral_limit num_microbatches_with_partial_activation_checkpoints""",
    "experts are torch's, one after another": """
        moe_grouped_gemm moe_use_legacy_grouped_gemm moe_permute_fusion moe_router_fusion moe_router_padding_* moe_extended_tp
        moe_layer_recompute moe_shared_expert_overlap overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release""",
    "engines generate, not the trainer": "inference_* use_inference_optimized_layers flash_decode mlp_chunks_for_prefill",
    "bf16 needs no loss scaling": "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis",
    "slime measures and reports by itself": "log_num_zeros_in_grad barrier_with_L1_time test_mode",
    "megatron-core does not read it any more": "async_tensor_model_parallel_allreduce",
    "it takes a Python object, which a recipe cannot hold": "timers *_grads_func *_scale_func *_sync_func",
}

# Taken, but without effect unless another option has this value.
NEEDS = {
    "recompute_method": ("recompute_granularity", "full"),
    "recompute_num_layers": ("recompute_granularity", "full"),
    "recompute_modules": ("recompute_granularity", "selective"),
    "bucket_size": ("overlap_grad_reduce", True),
    "disable_symmetric_registration": ("nccl_ub", True),
}
MODULES = ("core_attn", "mlp")  # of recompute_modules, in a dense model; recomputing layernorm is Transformer Engine's


@dataclass(frozen=True)
class Options:
    """Values by the dataclass that takes them; a field that several have goes to each."""

    model: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]


def sort_options(megatron: dict[str, Any]) -> Options:
    """Hand `trainer.megatron` to megatron-core's dataclasses.

    Raises ValueError for a name that none of them has, with the nearest one that does; for one that slime decides or that would do
    nothing, with the reason; and for a value that is not of the field's type.
    """
    for name, value in megatron.items():
        if (refusal := refusal_of(name)) is not None:
            raise ValueError(f"trainer.megatron.{name} {refusal}")
        if name not in TAKEN or name not in set().union(*NAMES.values()):
            near = difflib.get_close_matches(name, TAKEN, n=1)
            hint = f"; did you mean trainer.megatron.{near[0]}?" if near else ""
            raise ValueError(f"trainer.megatron.{name}: megatron-core has no such option{hint}")
        _check_type(name, value)
    _check_together(megatron)
    return Options(**{kind: {k: v for k, v in megatron.items() if k in names} for kind, names in NAMES.items()})


def refusal_of(name: str) -> str | None:
    """Why a field is not the user's to set; None for one that is, or that is in no table."""
    for table, words in ((DECIDED, "is decided by slime"), (INERT, "has no effect in slime")):
        for reason, names in table.items():
            if any(fnmatchcase(name, pattern) for pattern in names.split()):
                return f"{words}: {reason}"
    return None


def _check_together(megatron: dict[str, Any]) -> None:
    """Options that only another one gives an effect, and those that one needs."""
    for name, (other, value) in NEEDS.items():
        if name in megatron and megatron[name] != _default(name) and megatron.get(other) != value:
            needed = f"trainer.megatron.{other}={str(value).lower()}"
            raise ValueError(f"trainer.megatron.{name}={megatron[name]} has no effect without {needed}: set it, or remove {name}")
    if megatron.get("recompute_granularity") == "full" and None in map(megatron.get, ("recompute_method", "recompute_num_layers")):
        raise ValueError(
            "trainer.megatron.recompute_granularity=full needs trainer.megatron.recompute_method (uniform or block) and "
            "trainer.megatron.recompute_num_layers: set both, or recompute_granularity=selective"
        )
    for module in megatron.get("recompute_modules") or ():
        if module not in MODULES:
            raise ValueError(f"trainer.megatron.recompute_modules: {module} cannot be recomputed here; choose of {', '.join(MODULES)}")


def _default(name: str) -> Any:
    field = next(field for cls in KINDS.values() for field in fields(cls) if field.name == name)
    return None if field.default is MISSING else field.default


def _check_type(name: str, value: Any) -> None:
    hint = next(hints[name] for hints in HINTS.values() if name in hints)
    if not _fits(value, hint):
        raise ValueError(f"trainer.megatron.{name}={value}: takes {' or '.join(_takes(hint))}")


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
    """What a recipe may write for a field, in words."""
    words = []
    for branch in _branches(hint):
        if get_origin(branch) is Literal:
            words += [str(choice) for choice in get_args(branch)]
        elif (kind := get_origin(branch) or branch) in WORDS:
            words.append(WORDS[kind])
    return words
