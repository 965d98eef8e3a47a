"""What the losses hold of a whole vocabulary in fp32: every tensor that is made in the forward and the backward pass is looked at."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slime.algorithms.distillation import DIVERGENCES
from slime.config import TrainerConfig
from slime.config.parallel import parallel_sizes
from slime.config.plan_memory import CHUNKS
from slime.trainer.full_divergence import full_divergence
from slime.trainer.kernels import vocabulary_chunks
from slime.trainer.known_logprobs import known_logprobs, top_ids
from slime.trainer.logprobs import token_logprobs

ROWS, VOCAB, CHUNK_ROWS = 48, 1024, 8
CHUNK = CHUNK_ROWS * VOCAB
pytestmark = pytest.mark.e2e


class Watch(TorchDispatchMode):
    """The largest tensor in fp32 or wider that any operation returns, and the most elements of such ones alive at once; rows count, not the
    few numbers of each."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)]
        self.largest = max([self.largest, *(x.numel() for x in made)])
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(x) for x in made]
        held = [x for ref in self.alive if (x := ref()) is not None]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in held}
        self.most = max(self.most, sum(size for size in storages.values() if size >= VOCAB))
        return result


def obvious(logits, teacher, rows, ids, tp):
    return (logits[rows].float() / 0.7).log_softmax(-1).gather(1, ids)


def of_labels(logits, teacher, rows, ids, tp):
    picked, entropy = token_logprobs(logits, rows, ids[:, 0], 0.7, VOCAB - 3, tp)
    return picked + entropy


def of_known(logits, teacher, rows, ids, tp):
    return known_logprobs(logits, rows, ids, 0.7, VOCAB - 3, tp)


def likeliest(logits, teacher, rows, ids, tp):
    return top_ids(logits, rows, 4, VOCAB - 3, tp)


def whole(kind, logits, teacher, rows, ids, tp):
    return full_divergence(logits, teacher, rows, rows, 0.7, VOCAB - 3, tp, kind, 0.3)


def seen(place, of, *kind):
    """(largest, most) of one pass, forward and backward."""
    tp = place.join(parallel_sizes(TrainerConfig())).tp
    logits, teacher = torch.randn(2, ROWS, VOCAB).bfloat16()
    logits.requires_grad_()
    rows, ids = torch.arange(0, ROWS), torch.arange(4).expand(ROWS, 4) * 7
    with pytest.MonkeyPatch.context() as patch, Watch() as watch:
        patch.setattr(vocabulary_chunks, "CHUNK_ELEMENTS", CHUNK)
        found = of(*kind, logits, teacher, rows, ids, tp)
        if found.requires_grad:
            found.sum().backward()
            assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    return watch.largest, watch.most


CASES = [(of_labels,), (of_known,), (likeliest,), *((whole, kind) for kind in DIVERGENCES)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0].__name__, *case[1:]]))
def test_only_a_chunk_of_logits_is_ever_fp32(ranks, case):
    largest, most = ranks.run(seen, 1, *case)[0]
    assert CHUNK // 4 < largest <= CHUNK and most <= 2 * CHUNK < CHUNKS * CHUNK


def test_the_obvious_way_is_caught(ranks):
    largest, most = ranks.run(seen, 1, obvious)[0]
    assert largest == ROWS * VOCAB and most >= 2 * ROWS * VOCAB
