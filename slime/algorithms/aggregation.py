"""How per-token losses become one number: a weight for every token of an update."""

import numpy as np

from slime.types import Batch


def token_weights(batch: Batch, aggregation: str, max_response_tokens: int) -> np.ndarray:
    """Weights w with loss = sum_t w_t l_t over the whole update: float64 [T], 0 outside loss_mask.

    token      1 / trainable tokens of the update: the mean over tokens (DAPO, arXiv 2503.14476)
    sequence   the mean over sequences of each one's mean (GRPO, arXiv 2402.03300); sequences without a trainable token do not count
    constant   1 / (N * max_response_tokens): a sum over a constant length (Dr.GRPO, arXiv 2503.20783)

    They depend on the update's batch alone, which every rank has, and so on no micro-batch, packing order or layout.
    Raises ValueError for another `aggregation`. A batch without trainable tokens has weights of 0.
    """
    mask_T = batch.loss_mask.astype(np.float64)
    trained_N = batch.trained_lengths
    if aggregation == "token":
        return mask_T / max(trained_N.sum(), 1)
    if aggregation == "sequence":
        sequences = max(np.count_nonzero(trained_N), 1)
        return mask_T / (sequences * np.maximum(trained_N, 1))[batch.sample_of_token]
    if aggregation == "constant":
        return mask_T / (max(len(batch), 1) * max_response_tokens)
    raise ValueError(f"algorithm.aggregation={aggregation!r}: choose token, sequence or constant")
