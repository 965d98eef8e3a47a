"""Values and gradients against plain torch in fp64, on one and two vocabulary shards."""

import pytest
import torch

from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from slime.trainer.kernels import vocabulary_chunks
from slime.trainer.logprobs import token_logprobs

VOCAB, PADDED, ROWS, TEMPERATURE = 21, 24, 30, 0.7


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, PADDED, generator=g, dtype=torch.float64) * 4).to(dtype)
    rows = torch.randperm(ROWS, generator=g)[:17].sort().values
    labels = torch.randint(0, VOCAB, (17,), generator=g)
    return logits, rows, labels, torch.randn(17, generator=g), torch.randn(17, generator=g)


def reference(dtype):
    """(log-probs, entropy, gradient) in fp64 of the logits as rounded to dtype."""
    logits, rows, labels, d_logprobs, d_entropy = inputs(dtype)
    x = logits.double().requires_grad_()
    logp = (x[rows, :VOCAB] / TEMPERATURE).log_softmax(-1)
    picked, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    (picked * d_logprobs + entropy * d_entropy).sum().backward()
    return picked.detach(), entropy.detach(), x.grad


def ours(place, dtype, chunk_elements, use):
    """(log-probs, entropy, this rank's columns of the gradient)."""
    tp = place.join(parallel_sizes(TrainerConfig(tensor_parallel=place.world))).tp
    logits, rows, labels, d_logprobs, d_entropy = (x.to(place.device.torch) for x in inputs(dtype))
    local = logits.chunk(place.world, 1)[place.rank].contiguous().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_chunks, "CHUNK_ELEMENTS", chunk_elements)
        picked, entropy = token_logprobs(local, rows, labels, TEMPERATURE, VOCAB, tp)
        loss = {"both": picked * d_logprobs + entropy * d_entropy, "logprobs": picked * d_logprobs, "entropy": entropy * d_entropy}[use]
        loss.sum().backward()
    return picked.detach().cpu(), entropy.detach().cpu(), local.grad.cpu()


@pytest.mark.e2e
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 40])
def test_values_and_gradients(ranks, world, chunk_elements):
    expected = reference(torch.float32)
    found = ranks.run(ours, world, torch.float32, chunk_elements, "both")
    for picked, entropy, _ in found:
        torch.testing.assert_close(picked.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    gradient = torch.cat([g for *_, g in found], 1)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-4, atol=2e-6)
    assert (gradient[:, VOCAB:] == 0).all(), "padding gets no gradient"


@pytest.mark.e2e
def test_outputs_may_be_used_alone(ranks):
    both, a, b = (ranks.run(ours, 1, torch.float32, 1 << 24, use)[0][2] for use in ("both", "logprobs", "entropy"))
    torch.testing.assert_close(a + b, both, rtol=1e-5, atol=1e-6)


@pytest.mark.e2e
def test_bf16_logits_keep_their_dtype_and_give_fp32_results(ranks):
    expected = reference(torch.bfloat16)
    picked, entropy, gradient = ranks.run(ours, 1, torch.bfloat16, 1 << 24, "both")[0]
    assert picked.dtype == entropy.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(picked.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-2, atol=1e-3)


def no_rows(place):
    tp = place.join(parallel_sizes(TrainerConfig())).tp
    logits = torch.randn(4, PADDED, device=place.device.torch, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=place.device.torch)
    picked, _ = token_logprobs(logits, none, none, 1.0, VOCAB, tp)
    picked.sum().backward()
    return len(picked), logits.grad.cpu()


@pytest.mark.e2e
def test_no_trained_rows_give_a_zero_gradient(ranks):
    count, gradient = ranks.run(no_rows, 1)[0]
    assert count == 0 and (gradient == 0).all()
