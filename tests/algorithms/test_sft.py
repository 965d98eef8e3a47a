import numpy as np
import torch

from slime.algorithms import sft
from slime.algorithms.base import LossInputs
from slime.config import AlgorithmConfig
from slime.types import NO_VERSION, Batch


def test_loss_is_the_negative_log_probability():
    logprobs = torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    others = torch.full((3,), 7.0, dtype=torch.float64)
    out = sft.build(AlgorithmConfig(name="sft")).loss(
        LossInputs(logprobs, others, others, others, others, torch.zeros(3, dtype=torch.int64))
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), logprobs)
    assert out.loss.tolist() == [0.5, 2.0, 0.1] and grad.tolist() == [-1, -1, -1]
    assert out.metrics["nll"].tolist() == [0.5, 2.0, 0.1] and not out.metrics["nll"].requires_grad
    assert out.metrics["entropy"].tolist() == [7.0, 7.0, 7.0]


def test_it_needs_no_engine_no_old_logprobs_and_no_rewards():
    algorithm = sft.build(AlgorithmConfig(name="sft"))
    assert not algorithm.needs_rollouts and not algorithm.uses_old_logprobs
    batch = Batch(
        tokens=np.zeros(2, np.int32),
        cu_seqlens=np.array([0, 2]),
        loss_mask=np.array([False, True]),
        rollout_logprobs=np.zeros(2, np.float32),
        rewards=np.array([np.nan]),
        group=np.zeros(1, np.int64),
        version=np.array([NO_VERSION]),
    )
    assert algorithm.advantages(batch).tolist() == [0.0]
