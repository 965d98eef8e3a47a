"""Sums, means and minima of sequences that lie on two ranks are those of the whole sequences."""

import pytest
import torch

from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from tests.algorithms.local import LocalSequences, make_logits

pytestmark = pytest.mark.e2e
SAMPLE = [0, 0, 0, 2, 2, 3, 0, 2, 2, 2]  # of sequence 1 nothing is trained, of 3 one rank has nothing
FIRST = 6  # tokens of rank 0


def over_ranks(place, x):
    """(sum, mean, min, gradient of sum + mean by this rank's part, weighed by its position) of this rank's part of x [t]."""
    from slime.trainer.sequences import SequencesOfRanks

    parallel = place.join(parallel_sizes(TrainerConfig(context_parallel=2)))
    part = slice(0, FIRST) if place.rank == 0 else slice(FIRST, None)
    own, device = x[part].to(place.device.torch).requires_grad_(), place.device.torch
    sequences = SequencesOfRanks(torch.tensor(SAMPLE[part], device=device), 4, parallel.cp)
    added, mean, least = sequences.sum(own), sequences.mean(own), sequences.min(own)
    weights = torch.arange(1.0, len(x) + 1, dtype=x.dtype, device=device)[part]
    ((added + mean) * weights).sum().backward()
    assert not least.requires_grad
    return [found.detach().cpu().numpy() for found in (added, mean, least, own.grad)]


def test_of_two_ranks(ranks):
    x = make_logits(len(SAMPLE)).requires_grad_()
    sequences = LocalSequences(torch.tensor(SAMPLE))
    ((sequences.sum(x) + sequences.mean(x)) * torch.arange(1.0, len(x) + 1)).sum().backward()
    expected = sequences.sum(x), sequences.mean(x), sequences.min(x), x.grad
    for whole, *parts in zip(expected, *ranks.run(over_ranks, 2, x.detach()), strict=True):
        torch.testing.assert_close(torch.cat([torch.from_numpy(part) for part in parts]), whole.detach())
