"""What a critic learns: the returns of the tokens that were drawn."""

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """max((V - R)^2, (clip(V, V_old +- clip) - R)^2), fp32 [t], without a half; (V - R)^2 with clip=None (arXiv 1707.06347's
    reference implementation). Returns (loss, held); `held` is 1 where the bound stops the gradient, without gradient."""
    plain = (values - returns).square()
    if clip is None:
        return plain, torch.zeros_like(plain)
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(plain, bounded), (bounded > plain).to(plain.dtype)
