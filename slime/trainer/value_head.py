"""A critic's output layer: one number a token, of the hidden state that predicts it."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ValueHead(torch.nn.Module):
    """In place of a GPTModel's output layer: every tensor-parallel rank holds it whole. Its weight [1, hidden] is unset."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=device))
        # megatron-core adds up its gradient over the tensor-parallel ranks where each sees a stretch of the tokens
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        """hidden [L or this rank's stretch of it, 1, hidden], any float dtype -> (fp32 [L, 1, 1], no bias)."""
        values = F.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:  # every rank goes on with all of them, and has the whole gradient of its own
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
