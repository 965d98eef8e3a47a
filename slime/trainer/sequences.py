"""Sums over whole sequences whose tokens lie on several context-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequencesOfRanks:
    """`slime.algorithms.base.Sequences` for the trainable tokens of one micro-batch; the ranks of `group` hold parts of the same ones and
    call the same methods together."""

    def __init__(self, sample: Tensor, count: int, group: dist.ProcessGroup) -> None:
        """sample int64 [t], which of the micro-batch's `count` sequences a token belongs to."""
        self._sample, self._count, self._group = sample, count, group

    def sum(self, x: Tensor) -> Tensor:
        """[t], the sum of x over the trainable tokens of each token's sequence."""
        return self._sums(x)[self._sample]

    def mean(self, x: Tensor) -> Tensor:
        """[t], their mean."""
        return (self._sums(x) / self._sums(torch.ones_like(x)).clamp(min=1))[self._sample]

    def _sums(self, x: Tensor) -> Tensor:
        sums = x.new_zeros(self._count).index_add(0, self._sample, x)
        return sums if self._group.size() == 1 else _SumOverRanks.apply(sums, self._group)


class _SumOverRanks(torch.autograd.Function):
    """What every rank makes of the sum counts for the part of every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        d_x = d_total.clone()
        dist.all_reduce(d_x, group=ctx.group)
        return d_x, None
