"""How fast a batch was trained, against what its GPUs could do. Pure."""

from typing import Any

import numpy as np

from slime.models.map import ModelMap

# Dense bf16 peak of one GPU in FLOP/s, by the name that CUDA reports. Source: NVIDIA's data sheets of the A100, H100, H200, L40S and of the
# DGX B200 (an eighth), whose figures "with sparsity" are twice these. Names are matched whole: a MIG slice is not the card it is cut from.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
}


def train_flops(model: ModelMap, lengths: np.ndarray) -> float:
    """FLOPs of the model's matrix products, forward and backward, over sequences of these lengths (int [N], tokens).

    6 FLOPs a token and weight: 2 forward, 4 backward. Weights are those that a token is multiplied with: the layers', of a layer's
    experts the chosen ones alone, and the output layer's, tied or not; neither the looked-up embedding nor norms. Causal attention adds
    for each pair of a token with itself or one before it 6 FLOPs a channel that queries and keys meet in and 6 a channel of values: 2
    forward, 4 backward. Recomputation, padding and a pass for log-probs alone do not count.
    """
    config = model.transformer
    latent = config.get("multi_latent_attention", False)
    weights, channels = _latent_attention(config) if latent else _grouped_attention(config)
    layers = config["num_layers"]
    sparse = sum(config["moe_layer_freq"]) if model.has_experts else 0
    feed_forward = (layers - sparse) * _gated(config, config["ffn_hidden_size"]) + (sparse * _experts(config) if sparse else 0)
    multiplied = layers * weights + feed_forward + config["hidden_size"] * model.vocab_size
    tokens = lengths.astype(np.float64)
    pairs = (tokens * (tokens + 1) / 2).sum()
    return float(6 * multiplied * tokens.sum() + 6 * layers * channels * pairs)


def _grouped_attention(config: dict[str, Any]) -> tuple[int, int]:
    """Weights of a layer's projections (query, key, value, output), and the channels of all its heads' products."""
    query_width = config["num_attention_heads"] * config["kv_channels"]
    kv_width = config["num_query_groups"] * config["kv_channels"]
    return config["hidden_size"] * (2 * query_width + 2 * kv_width), 2 * query_width


def _latent_attention(config: dict[str, Any]) -> tuple[int, int]:
    """The same of latent attention as it is trained: keys and values of every head are made from the latent, none is absorbed."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rotated, value = config["qk_head_dim"], config["qk_pos_emb_head_dim"], config["v_head_dim"]
    query_width, q_rank = heads * (nope + rotated), config["q_lora_rank"]
    queries = hidden * query_width if q_rank is None else q_rank * (hidden + query_width)
    keys_and_values = hidden * (rank + rotated) + rank * heads * (nope + value)
    return queries + keys_and_values + heads * value * hidden, query_width + heads * value


def _gated(config: dict[str, Any], inner: int) -> int:
    """Weights of a gated MLP: gate, up and down."""
    return 3 * config["hidden_size"] * inner


def _experts(config: dict[str, Any]) -> int:
    """Weights that a token meets in a layer with experts: the router, the experts that it chooses, the shared ones."""
    router = config["hidden_size"] * config["num_moe_experts"]
    shared = config.get("moe_shared_expert_intermediate_size", 0)
    return router + _gated(config, config["moe_router_topk"] * config["moe_ffn_hidden_size"] + shared)


def of_gpus(name: str, gpus: int, tokens: int, flops: float, seconds: float, peak_bytes: float) -> dict[str, float]:
    """perf/* of `gpus` devices that together trained `tokens` in `seconds`, computing `flops`.

    perf/tokens_per_s_per_gpu; perf/gpu_mem_gb (1e9 bytes); perf/mfu, FLOPs over what the GPUs' dense bf16 peak allows in that time, absent
    for a GPU whose peak is not known.
    """
    found = {"perf/tokens_per_s_per_gpu": tokens / seconds / gpus, "perf/gpu_mem_gb": peak_bytes / 1e9}
    if name in PEAK_FLOPS:
        found["perf/mfu"] = flops / (seconds * gpus * PEAK_FLOPS[name])
    return found
