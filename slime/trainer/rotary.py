"""Frequencies of rotary embeddings, computed as transformers computes them, so that trainer and engines rotate by the same bits."""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from slime.models.rope import Linear, Llama3, Rope, Yarn


def inverse_frequencies(rope: Rope) -> Tensor:
    """fp32 [dim / 2], radians a position."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case Linear(factor):
            return plain / factor
        case Llama3() as scaling:
            return _llama3(plain, scaling)
        case Yarn() as scaling:
            return _yarn(rope.theta**exponents, rope, scaling)
        case None:
            return plain


def _llama3(plain: Tensor, s: Llama3) -> Tensor:
    wavelength = 2 * math.pi / plain
    longest, shortest = s.original_length / s.low_freq_factor, s.original_length / s.high_freq_factor
    slowed = torch.where(wavelength > longest, plain / s.factor, plain)
    smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - smooth) * slowed / s.factor + smooth * slowed
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, slowed)


def _yarn(wave: Tensor, rope: Rope, s: Yarn) -> Tensor:
    """`wave` is theta^(2i/dim)."""

    def turning(rotations: float) -> float:
        """The (fractional) channel that turns this often within the original length."""
        return rope.dim * math.log(s.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(s.beta_fast), turning(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (s.factor * wave) * (1 - kept) + 1.0 / wave * kept


def install(model: torch.nn.Module, rope: Rope) -> None:
    """Give every rotary embedding of a megatron-core model these frequencies."""
    frequencies = inverse_frequencies(rope)
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            assert module.inv_freq.shape == frequencies.shape, f"megatron-core rotates {2 * len(module.inv_freq)} channels, not {rope.dim}"
            module.inv_freq = frequencies.to(module.inv_freq.device)
