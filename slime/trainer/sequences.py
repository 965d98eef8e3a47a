"""Sums over whole sequences whose tokens lie on several context-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.algorithms.sequences import SequencesHere


class SequencesOfRanks(SequencesHere):
    """`slime.algorithms.base.Sequences` for the trainable tokens of one micro-batch; the ranks of `group` hold parts of the same ones and
    call the same methods together."""

    def __init__(self, sample: Tensor, count: int, group: dist.ProcessGroup) -> None:
        """sample int64 [t], which of the micro-batch's `count` sequences a token belongs to."""
        super().__init__(sample, count)
        self._group = group

    def _added(self, sums: Tensor) -> Tensor:
        return sums if self._group.size() == 1 else _SumOverRanks.apply(sums, self._group)

    def _least(self, lows: Tensor) -> Tensor:
        if self._group.size() > 1:
            dist.all_reduce(lows, dist.ReduceOp.MIN, group=self._group)
        return lows


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
