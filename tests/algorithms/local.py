"""What the tests of the losses share: sequences that lie here whole, exact sums over what a policy may draw, gradients in closed form."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slime.algorithms.base import LossInputs, Sequences


class LocalSequences:
    """`Sequences` of tokens that all lie here. `sample` [t] names each token's sequence; its tokens need not be neighbours."""

    def __init__(self, sample: Tensor) -> None:
        _, self.of = torch.unique(sample, return_inverse=True)
        self.count = torch.bincount(self.of)

    def sum(self, x: Tensor) -> Tensor:
        return torch.zeros(len(self.count), dtype=x.dtype).index_add(0, self.of, x)[self.of]

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.count[self.of]

    def min(self, x: Tensor) -> Tensor:
        return torch.stack([x[self.of == own].min() for own in self.of]).detach() if len(x) else x.detach()


def make_inputs(t: int, seed: int = 0, shift: float = 0.3, sequences: Sequences | None = None) -> LossInputs:
    """float64, sequences of three tokens, old log-probs near the current ones, so that some ratios are clipped and some are not."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(t, generator=g, dtype=torch.float64)

    logprobs = -normal().abs() - 0.1
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs + shift * normal(),
        entropy=normal().abs().requires_grad_(),
        advantages=normal(),
        rollout_logprobs=logprobs + 0.01 * normal(),
        sequences=sequences or LocalSequences(torch.arange(t) // 3),
        ref_logprobs=logprobs + 0.2 * normal(),
        distillation=normal().abs().requires_grad_(),
    )


def make_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(logits: Sequence[float]) -> list[float]:
    total = math.fsum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q) of two distributions; what p never draws adds nothing."""
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def reverse_kl_gradient(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """d KL(p || q) / d logits of p: p_j (log p_j / q_j - KL)."""
    whole = kl(p, q)
    return [a * (math.log(a / b) - whole) for a, b in zip(p, q, strict=True)]


def forward_kl_gradient(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """d KL(q || p) / d logits of p: p_j - q_j."""
    return [a - b for a, b in zip(p, q, strict=True)]


def expected_gradient(logits: Tensor, loss: Callable[[Tensor], Tensor], drawn_from: Sequence[float] | None = None) -> list[float]:
    """The gradient with respect to the logits [v] that a sampled loss has on average, over every token once with its probability:
    sum_a mu(a) d loss(a) / d logits. `loss` maps the log-probs [v] of all tokens to a loss of each; mu is the policy unless given."""
    logits = logits.detach().clone().requires_grad_()
    mu = softmax(logits.tolist()) if drawn_from is None else drawn_from
    losses = loss(logits.log_softmax(-1))
    total = [0.0] * len(logits)
    for a, probability in enumerate(mu):
        (gradient,) = torch.autograd.grad(losses[a], logits, retain_graph=True)
        total = [s + probability * g for s, g in zip(total, gradient.tolist(), strict=True)]
    return total
