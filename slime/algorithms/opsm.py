"""Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): bad answers that are not the policy's own teach nothing.

A token of negative advantage is dropped where the mean over its sequence of log p (engine, as it drew them) - log p (the current policy)
exceeds delta. The paper's p_old is the engine's: both older weights and other numerics count, and one optimizer step a batch is enough.
"""

import torch
from torch import Tensor

from slime.algorithms.base import Sequences


def dropped_tokens(logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, sequences: Sequences, delta: float) -> Tensor:
    """bool [t], without gradient."""
    with torch.no_grad():
        return (advantages < 0) & (sequences.mean(rollout_logprobs - logprobs) > delta)
