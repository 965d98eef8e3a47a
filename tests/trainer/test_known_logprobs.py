"""Values and gradients against plain torch in fp64, on one and two vocabulary shards."""

import pytest
import torch

from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from slime.trainer.kernels import vocabulary_chunks

VOCAB, PADDED, ROWS, K, TEMPERATURE = 21, 24, 30, 4, 0.7
pytestmark = pytest.mark.e2e


def inputs(scale=4.0):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, PADDED, generator=g, dtype=torch.float64) * scale).float()
    rows = torch.randperm(ROWS, generator=g)[:17].sort().values
    ids = torch.stack([torch.randperm(VOCAB, generator=g)[:K] for _ in rows])
    return logits, rows, ids, torch.randn(17, K + 1, generator=g)


def reference(scale=4.0):
    logits, rows, ids, d_known = inputs(scale)
    x = logits.double().requires_grad_()
    logp = (x[rows, :VOCAB] / TEMPERATURE).log_softmax(-1)
    others = logp.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    known = torch.cat([logp.gather(1, ids), others], 1)
    (known * d_known).sum().backward()
    return known.detach(), x.grad


def ours(place, chunk_elements, scale):
    from slime.trainer.known_logprobs import known_logprobs

    tp = place.join(parallel_sizes(TrainerConfig(tensor_parallel=place.world))).tp
    logits, rows, ids, d_known = inputs(scale)
    local = logits.chunk(place.world, 1)[place.rank].contiguous().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_chunks, "CHUNK_ELEMENTS", chunk_elements)
        known = known_logprobs(local, rows, ids, TEMPERATURE, VOCAB, tp)
        (known * d_known).sum().backward()
    return known.detach(), local.grad


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 40])
@pytest.mark.parametrize("scale", [4.0, 30.0], ids=["usual", "tails of e-20"])
def test_values_and_gradients(ranks, world, chunk_elements, scale):
    expected = reference(scale)
    found = ranks.run(ours, world, chunk_elements, scale)
    for known, _ in found:
        torch.testing.assert_close(known.double(), expected[0], rtol=1e-5, atol=1e-5 * scale)
    gradient = torch.cat([g for _, g in found], 1)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=5e-6 * scale)
    assert (gradient[:, VOCAB:] == 0).all(), "padding gets no gradient"
