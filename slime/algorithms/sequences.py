"""Sums, means and minima over the sequences of packed tokens."""

import torch
from torch import Tensor


class SequencesHere:
    """`slime.algorithms.base.Sequences` of tokens that all lie here. A subclass of which several ranks hold parts goes over them in
    `_added` and `_least`."""

    def __init__(self, sample: Tensor, count: int) -> None:
        """sample int64 [t], which of `count` sequences a token belongs to."""
        self._sample, self._count = sample, count

    def sum(self, x: Tensor) -> Tensor:
        """[t], the sum of x over the trainable tokens of each token's sequence."""
        return self._sums(x)[self._sample]

    def mean(self, x: Tensor) -> Tensor:
        """[t], their mean."""
        return (self._sums(x) / self._sums(torch.ones_like(x)).clamp(min=1))[self._sample]

    def min(self, x: Tensor) -> Tensor:
        """[t], the least of them, without gradient."""
        x = x.detach()
        return self._least(x.new_full((self._count,), torch.inf).scatter_reduce(0, self._sample, x, "amin"))[self._sample]

    def _sums(self, x: Tensor) -> Tensor:
        return self._added(x.new_zeros(self._count).index_add(0, self._sample, x))

    def _added(self, sums: Tensor) -> Tensor:
        """[count], over all ranks."""
        return sums

    def _least(self, lows: Tensor) -> Tensor:
        """[count], over all ranks."""
        return lows
