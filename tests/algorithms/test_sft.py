"""Supervised fine-tuning: the negative log-probability of what was demonstrated, and nothing else."""

import numpy as np
import torch

from slime.algorithms import sft
from slime.algorithms.base import Step
from slime.config import AlgorithmConfig
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import make_batch, replaced, slope


def built():
    return sft.build(AlgorithmConfig("sft"))


def test_the_loss_is_the_negative_log_probability():
    x = make_inputs(3)
    x.logprobs = torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    out = built().loss(x)
    assert out.loss.tolist() == [0.5, 2.0, 0.1] and slope(out.loss.sum(), x.logprobs).tolist() == [-1, -1, -1]


def test_the_gradient_agrees_with_finite_differences():
    x = make_inputs(24, shift=1.0)
    assert torch.autograd.gradcheck(lambda logprobs: built().loss(replaced(x, logprobs=logprobs)).loss, x.logprobs)


def test_metrics_are_per_token_and_carry_no_gradient():
    x = make_inputs(5)
    metrics = built().loss(x).metrics
    assert metrics.keys() == {"nll", "entropy"} and not any(value.requires_grad for value in metrics.values())
    assert torch.equal(metrics["nll"], -x.logprobs) and torch.equal(metrics["entropy"], x.entropy)


def test_it_reads_no_advantages_no_engine_no_reference_and_no_old_policy():
    x = make_inputs(5)
    nothing = torch.full((5,), torch.nan, dtype=torch.float64)
    read = ("logprobs", "entropy", "sequences")
    blind = replaced(x, **{name: nothing for name in type(x).__slots__ if name not in read})
    assert torch.equal(built().loss(blind).loss, built().loss(x).loss)


def test_it_needs_no_engine_no_old_logprobs_and_no_rewards():
    algorithm, batch = built(), make_batch(rewards=[np.nan] * 7)
    assert not (algorithm.needs_rollouts or algorithm.uses_old_logprobs or algorithm.uses_reference or algorithm.uses_critic)
    advantages = algorithm.targets(Step(batch)).advantages
    assert advantages.shape == batch.tokens.shape and not advantages.any()
