"""Seeded sampling whose draw does not depend on what else is in the batch.

SGLang adds a seeded noise to the log-probability of each column and takes the largest. As soon as one request of a batch asks for top-p or
top-k, it does so over columns in order of probability instead of vocabulary order, for every request of the batch: the same seed then
draws another token. Here the filters set columns to zero and the draw is always in vocabulary order, as without filters.
"""

import torch
from sglang.srt.layers import sampler

_stock = sampler.top_k_top_p_min_p_sampling_from_probs_torch


def install():
    """Replace SGLang's filtered sampling in this process; the only caller looks the function up in its module."""
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sample


def sample(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options):
    """int32 [B] drawn from probs [B, V] under top_ks, top_ps [B]. Requests without a seed are sampled as SGLang does."""
    if sampling_seed is None or need_min_p_sampling or options.get("return_filtered_probs"):
        return _stock(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options)
    kept = filter_probs(probs, top_ks, top_ps)
    drawn = sampler.sampling_from_probs_torch(kept, sampling_seed=sampling_seed, positions=positions)
    return drawn.view(-1).to(torch.int32)


def filter_probs(probs, top_ks, top_ps):
    """probs [B, V] with zeros outside the top_ks [B] likeliest columns and the smallest set of mass top_ps [B]."""
    ordered, columns = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier columns
    rank = torch.arange(probs.shape[-1], device=probs.device)
    dropped = (rank >= top_ks.view(-1, 1)) | (before > top_ps.view(-1, 1))
    return probs.masked_fill(torch.zeros_like(dropped).scatter_(1, columns, dropped), 0.0)
