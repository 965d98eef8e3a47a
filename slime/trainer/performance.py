"""How fast a batch was trained, against what its GPUs could do. Pure."""

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

    6 FLOPs a token and weight: 2 forward, 4 backward. Weights are those that a token is multiplied with: the layers' and the output
    layer's, tied or not, and neither the looked-up embedding nor norms. Causal attention adds 12 FLOPs a layer, query channel and pair
    of a token with itself or one before it: QK^T and AV, 2 each forward, twice that backward. Recomputation, padding and a pass for
    log-probs alone do not count.
    """
    config = model.transformer
    hidden, layers = config["hidden_size"], config["num_layers"]
    query_width = config["num_attention_heads"] * config["kv_channels"]
    kv_width = config["num_query_groups"] * config["kv_channels"]
    attention = hidden * (2 * query_width + 2 * kv_width)
    mlp = (3 if config["gated_linear_unit"] else 2) * hidden * config["ffn_hidden_size"]
    weights = layers * (attention + mlp) + hidden * model.vocab_size
    tokens = lengths.astype(np.float64)
    pairs = (tokens * (tokens + 1) / 2).sum()
    return float(6 * weights * tokens.sum() + 12 * layers * query_width * pairs)


def of_gpus(name: str, gpus: int, tokens: int, flops: float, seconds: float, peak_bytes: float) -> dict[str, float]:
    """perf/* of `gpus` devices that together trained `tokens` in `seconds`, computing `flops`.

    perf/tokens_per_s_per_gpu; perf/gpu_mem_gb (1e9 bytes); perf/mfu, FLOPs over what the GPUs' dense bf16 peak allows in that time, absent
    for a GPU whose peak is not known.
    """
    found = {"perf/tokens_per_s_per_gpu": tokens / seconds / gpus, "perf/gpu_mem_gb": peak_bytes / 1e9}
    if name in PEAK_FLOPS:
        found["perf/mfu"] = flops / (seconds * gpus * PEAK_FLOPS[name])
    return found
