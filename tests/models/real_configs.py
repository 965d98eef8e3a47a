"""config.json as these models have it on the hub (fields of identity and tokens left out), in the spelling of their time."""

from typing import Any

Fields = dict[str, Any]


def usual(model_type: str, architecture: str, **fields: Any) -> Fields:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        **fields,
    }


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, positions: int, eps: float) -> Fields:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
    }


def experts(routed: int, shared: int, per_token: int, width: int, scaling: float, dense: int) -> Fields:
    return {
        "n_routed_experts": routed,
        "n_shared_experts": shared,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "routed_scaling_factor": scaling,
        "first_k_dense_replace": dense,
    }


LATENT: Fields = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LLAMA3: Fields = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN: Fields = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
AUTO_MAP = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}
GLM_MOE: Fields = {
    "attention_bias": True,
    "head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
}

CONFIGS: dict[str, Fields] = {
    "Llama-3.1-8B": usual(
        "llama",
        "LlamaForCausalLM",
        **sizes(4096, 32, 32, 8, 14336, 128256, 131072, 1e-5),
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
        rope_theta=500000.0,
    )
    | {"rope_scaling": LLAMA3},
    "Qwen2.5-7B": usual(
        "qwen2",
        "Qwen2ForCausalLM",
        **sizes(3584, 28, 28, 4, 18944, 152064, 131072, 1e-6),
        max_window_layers=28,
        rope_theta=1000000.0,
        sliding_window=131072,
        use_mrope=False,
        use_sliding_window=False,
    ),
    "Qwen3-8B": usual(
        "qwen3",
        "Qwen3ForCausalLM",
        **sizes(4096, 36, 32, 8, 12288, 151936, 40960, 1e-6),
        attention_bias=False,
        head_dim=128,
        max_window_layers=36,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "Qwen3-30B-A3B": usual(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **sizes(2048, 48, 32, 4, 6144, 151936, 40960, 1e-6),
        attention_bias=False,
        decoder_sparse_step=1,
        head_dim=128,
        max_window_layers=48,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        output_router_logits=False,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "glm-4-9b-chat-hf": usual(
        "glm",
        "GlmForCausalLM",
        **sizes(4096, 40, 32, 2, 13696, 151552, 131072, 1.5625e-07),
        attention_bias=True,
        head_dim=128,
        pad_token_id=151329,
        rope_theta=10000.0,
    ),
    "GLM-4-9B-0414": usual(
        "glm4",
        "Glm4ForCausalLM",
        **sizes(4096, 40, 32, 2, 13696, 151552, 32768, 1e-5),
        attention_bias=True,
        head_dim=128,
        pad_token_id=151329,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
    ),
    "GLM-4.5-Air": usual(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        **sizes(4096, 46, 96, 8, 10944, 151552, 131072, 1e-5),
        **experts(128, 1, 8, 1408, 1.0, 1),
        **GLM_MOE,
        use_qk_norm=False,
    ),
    "GLM-4.6": usual(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        **sizes(5120, 92, 96, 8, 12288, 151552, 202752, 1e-5),
        **experts(160, 1, 8, 1536, 2.5, 3),
        **GLM_MOE,
        use_qk_norm=True,
    ),
    "GLM-4.7-Flash": usual(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        **sizes(2048, 47, 20, 20, 10240, 154880, 202752, 1e-5),
        **experts(64, 1, 4, 1536, 1.8, 1),
        **(LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256}),
        attention_bias=False,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        num_nextn_predict_layers=1,
        pad_token_id=154820,
        partial_rotary_factor=1.0,
        q_lora_rank=768,
        rope_theta=1000000,
    ),
    "DeepSeek-V2-Lite": usual(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        **sizes(2048, 27, 16, 16, 10944, 102400, 163840, 1e-6),
        **experts(64, 2, 6, 1408, 1.0, 1),
        **LATENT,
        attention_bias=False,
        auto_map=AUTO_MAP,
        aux_loss_alpha=0.001,
        ep_size=1,
        moe_layer_freq=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        pretraining_tp=1,
        q_lora_rank=None,
        rope_theta=10000,
        scoring_func="softmax",
        seq_aux=True,
    )
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "DeepSeek-V3": usual(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **sizes(7168, 61, 128, 128, 18432, 129280, 163840, 1e-6),
        **experts(256, 1, 8, 2048, 2.5, 3),
        **LATENT,
        attention_bias=False,
        auto_map=AUTO_MAP,
        ep_size=1,
        moe_layer_freq=1,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        num_nextn_predict_layers=1,
        q_lora_rank=1536,
        rope_theta=10000,
        scoring_func="sigmoid",
    )
    | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "Mixtral-8x7B": usual(
        "mixtral",
        "MixtralForCausalLM",
        **sizes(4096, 32, 32, 8, 14336, 32000, 32768, 1e-5),
        num_experts_per_tok=2,
        num_local_experts=8,
        output_router_logits=False,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
    ),
}
