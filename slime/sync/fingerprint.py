"""A tensor's fingerprint: a keyed sum over its words, by which trainer and engines prove that they hold the same bits.

A tensor is read as words: 16 bits of its little-endian bytes, or bytes where an element is one byte. Element i of width w >= 2 has the
words i * w/2 ... (i + 1) * w/2 - 1. Everything is modulo 2^64:

    GOLD = 0x9E3779B97F4A7C15        mix: the finaliser of splitmix64
    run_key    = blake2b(run_id, 8 bytes), little endian
    V[j]       = mix(run_key + (j + 1) GOLD) | 1                  j = 0 ... 1023, one table a run
    tensor_key = blake2b(name, 8 bytes, key = run_key)
    U(h)       = mix(tensor_key + (h + 1) GOLD) | 1
    F          = sum over words i of U(i >> 10) V[i & 1023] word_i

It is additive: any division of the tensor and any order give the same sum, and a change costs its own words:
F' = F - at(positions, old) + at(positions, new).

What it misses. A single changed word always shows: its factor is odd and the difference is below 2^16, so that their product is not 0.
For several words write F = sum over h of U(h) S(h), where S(h) sums V d over the differences d of 1024 words. Take an h with any change,
and of its differences the one with the fewest factors of two, 2^t, t <= 15. If the tables were uniform odd numbers, 2^s would divide S(h)
with probability 2^-(s-1-t) at most, and U(h) would then cancel all the rest with probability 2^-(63-s). Summed over s: any change at all
collides with probability 49 x 2^-47 < 2^-41 at most, which sign bits flipped at the corners of a rectangle come near; 2^-55 when a
difference is odd, as a unit in the last place is; 2^-48 when all changes lie in one h. They are outputs of a mixer whose keys nobody chose
with the change in view, so these bounds are for accidents: errors of memory, transport and code. They are none against someone who knows
run_id and forges; the manifest's MAC is for that.
"""

import hashlib

import numpy as np

from slime.sync import native
from slime.sync.native import RUN

__all__ = ["RUN", "at", "full", "moved", "over_runs", "run_key", "table", "tensor_key"]


def run_key(run_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=8).digest(), "little")


def tensor_key(key: int, name: str) -> int:
    """The key of the tensor of this HF name in the run with this key."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key.to_bytes(8, "little")).digest(), "little")


def table(key: int) -> np.ndarray:
    """uint64 [1024]: V of the run with this key."""
    return native.table(key)


def full(bits: np.ndarray, tensor_key: int, table: np.ndarray, start_element: int = 0) -> int:
    """Fingerprint of consecutive elements (bits, 1-D, contiguous), the first at position `start_element` of its tensor."""
    size = min(bits.itemsize, 2)
    return native.fingerprint(bits, start_element * (bits.itemsize // size), size, tensor_key, table)


def at(positions: np.ndarray, bits: np.ndarray, tensor_key: int, table: np.ndarray) -> int:
    """Fingerprint of the elements at positions (int64 [n]) that have these bits [n]."""
    return native.fingerprint_at(np.ascontiguousarray(positions), np.ascontiguousarray(bits), tensor_key, table)


def moved(positions: np.ndarray, old: np.ndarray, new: np.ndarray, tensor_key: int, table: np.ndarray) -> int:
    """What a tensor's fingerprint grows by, modulo 2^64, where the elements at positions (int64 [n]) go from old bits [n] to new ones."""
    positions, old, new = map(np.ascontiguousarray, (positions, old, new))
    return native.fingerprint_moved(positions, old, new, tensor_key, table)


def over_runs(runs: np.ndarray, table: np.ndarray, outs: int) -> np.ndarray:
    """uint64 [outs]: fingerprints of RUNs of this process's memory, those of one `out` added. The addresses must be readable."""
    return native.over_runs(runs, table, outs)
