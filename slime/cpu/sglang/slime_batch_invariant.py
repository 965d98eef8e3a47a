"""Matrix products whose rows do not depend on the batch they are in.

A BLAS picks its kernel, and with it the order of additions, by the number of rows; the same token then gets other last bits alone than
among others. Here every product runs in blocks of exactly ROWS rows, the last one padded with zeros, so a row always meets the same kernel.
"""

import torch

ROWS = 16

_library = None


def enable(*args, **kwargs):
    """Replace torch's CPU matrix products in this process. Takes and ignores what SGLang's own function of this name takes."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("mm", mm, "CPU", allow_override=True)
        _library.impl("addmm", addmm, "CPU", allow_override=True)


def mm(a, b):
    """[M, K] @ [K, N]."""
    m, k = a.shape
    out = a.new_empty((-(-m // ROWS) * ROWS, b.shape[1]))
    whole = m - m % ROWS
    for i in range(0, whole, ROWS):
        torch.mm(a[i : i + ROWS], b, out=out[i : i + ROWS])
    if whole < m:
        last = a.new_zeros((ROWS, k))
        last[: m - whole] = a[whole:]
        torch.mm(last, b, out=out[whole:])
    return out[:m]


def addmm(bias, a, b, *, beta=1, alpha=1):
    """beta * bias + alpha * ([M, K] @ [K, N])."""
    return beta * bias + alpha * mm(a, b)
