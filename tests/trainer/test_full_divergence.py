"""Values and gradients against `slime.algorithms.distillation` in fp64, on one and two vocabulary shards."""

import pytest
import torch

from slime.algorithms.distillation import DIVERGENCES, divergence
from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from slime.trainer.kernels import vocabulary_chunks

VOCAB, PADDED, ROWS, TEMPERATURE, BETA = 21, 24, 30, 0.7, 0.3
pytestmark = pytest.mark.e2e


def inputs(same=False):
    g = torch.Generator().manual_seed(0)
    logits, teacher = ((torch.randn(ROWS, PADDED, generator=g, dtype=torch.float64) * 4).float() for _ in range(2))
    rows, other_rows = (torch.randperm(ROWS, generator=g)[:17] for _ in range(2))
    if same:
        teacher[other_rows] = logits[rows]
    return logits, teacher, rows.sort().values, other_rows[rows.argsort()], torch.randn(17, generator=g)


def reference(kind):
    logits, teacher, rows, other_rows, d_found = inputs()
    x = logits.double().requires_grad_()
    student, other = ((of[at, :VOCAB] / TEMPERATURE).log_softmax(-1) for of, at in ((x, rows), (teacher.double(), other_rows)))
    found = divergence(student, other, kind, BETA)
    (found * d_found).sum().backward()
    return found.detach(), x.grad


def ours(place, chunk_elements, kind, same=False):
    from slime.trainer.full_divergence import full_divergence

    tp = place.join(parallel_sizes(TrainerConfig(tensor_parallel=place.world))).tp
    logits, teacher, rows, other_rows, d_found = (x.to(place.device.torch) for x in inputs(same))
    local, other = (of.chunk(place.world, 1)[place.rank].contiguous().requires_grad_() for of in (logits, teacher))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_chunks, "CHUNK_ELEMENTS", chunk_elements)
        found = full_divergence(local, other, rows, other_rows, TEMPERATURE, VOCAB, tp, kind, BETA)
        (found * d_found).sum().backward()
    assert other.grad is None, "a teacher is not trained"
    return found.detach().cpu(), local.grad.cpu()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 100])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_gradients(ranks, world, chunk_elements, kind):
    expected = reference(kind)
    results = ranks.run(ours, world, chunk_elements, kind)
    for found, _ in results:
        torch.testing.assert_close(found.double(), expected[0], rtol=1e-5, atol=1e-5)
    gradient = torch.cat([g for _, g in results], 1)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=5e-6)
    assert (gradient[:, VOCAB:] == 0).all(), "padding gets no gradient"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(ranks, kind):
    found, gradient = ranks.run(ours, 1, 1 << 24, kind, True)[0]
    assert found.abs().max() < 1e-6 and gradient.abs().max() < 1e-6
