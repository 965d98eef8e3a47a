"""torch.ops.sgl_kernel.murmur_hash32_cpu: MurmurHash3 (32 bits) of (seed, position, column), the uniform numbers of seeded sampling.

The same bits as SGLang's Triton kernel `sglang.kernels.ops.sampling.murmur_hash`: four 32-bit blocks (seed low, seed high, position,
column) and the length 16 are mixed; all arithmetic is modulo 2**32, held in int64.
"""

import torch

_MASK = 0xFFFFFFFF


def _rotate_left(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _mix(h, block):
    block = _rotate_left((block * 0xCC9E2D51) & _MASK, 15)
    block = (block * 0x1B873593) & _MASK
    return (_rotate_left(h ^ block, 13) * 5 + 0xE6546B64) & _MASK


def _finish(h):
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def murmur_hash32(seed, positions, col_indices):
    """uint32 [B, V] from seed int64 or uint64 [B], positions [B], col_indices [V]."""
    seed = seed.view(torch.int64)
    h = torch.zeros_like(seed)
    for block in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        h = _mix(h, block)
    h = _mix(h[:, None], col_indices.to(torch.int64)[None, :] & _MASK)
    return _finish(h ^ 16).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
