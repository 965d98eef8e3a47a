import torch

from slime.algorithms import sft
from slime.config import AlgorithmConfig
from tests.algorithms.test_grpo import make_batch, make_inputs


def test_loss_is_the_negative_log_probability():
    x = make_inputs(6)
    algorithm = sft.build(AlgorithmConfig(name="sft"))
    out = algorithm.loss(x)
    (grad,) = torch.autograd.grad(out.loss.sum(), x.logprobs)
    assert torch.equal(out.loss, -x.logprobs) and torch.equal(grad, torch.full_like(grad, -1))
    assert torch.equal(out.metrics["nll"], -x.logprobs) and not out.metrics["nll"].requires_grad


def test_it_needs_no_engine_no_old_logprobs_and_no_rewards():
    algorithm = sft.build(AlgorithmConfig(name="sft"))
    assert not algorithm.needs_rollouts and not algorithm.uses_old_logprobs
    assert algorithm.advantages(make_batch([1.0, 0.0], [0, 0])).tolist() == [0.0, 0.0]
