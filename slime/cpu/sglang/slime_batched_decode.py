"""Decode attention of the torch_native backend for the whole batch at once.

SGLang's torch_native backend calls scaled_dot_product_attention once a sequence; with short sequences three quarters of a decode step are
the overhead of these calls. Here keys and values of all sequences are gathered into one padded block, and one masked call does the rest.
A row's last bits then depend on how far it is padded, so deterministic mode keeps the stock loop.
"""

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

MOST_PADDING = 4  # padded positions a real one; beyond it the stock loop is the cheaper one

_stock = TorchNativeAttnBackend._run_sdpa_forward_decode


def install():
    """Replace the loop in this process."""
    TorchNativeAttnBackend._run_sdpa_forward_decode = decode


def decode(
    self,
    query,
    output,
    k_cache,
    v_cache,
    req_to_token,
    req_pool_indices,
    seq_lens,
    encoder_lens=None,
    scaling=None,
    enable_gqa=False,
    causal=False,
    is_cross_attn=False,
    sliding_window_size=None,
):
    """query, output: [B, H, D]; caches: [slots, heads, D]; req_to_token: slots of each request [requests, length]; seq_lens: [B]."""
    longest, total = int(seq_lens.max()), int(seq_lens.sum())
    windowed = sliding_window_size is not None and sliding_window_size > -1
    if encoder_lens is not None or windowed or len(seq_lens) * longest > MOST_PADDING * total:
        rest = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
        return _stock(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, *rest)
    is_real = torch.arange(longest) < seq_lens[:, None]
    slots = req_to_token[req_pool_indices, :longest]
    slots = torch.where(is_real, slots, slots[:, :1])  # padding reads the first token, whose values are finite
    keys, values = (cache[slots].transpose(1, 2).to(query.dtype) for cache in (k_cache, v_cache))
    mask = is_real[:, None, None, :]
    found = scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask, scale=scaling, enable_gqa=enable_gqa)
    output.copy_(found[:, :, 0])
    return output
