"""Which experts a token goes to: as the model's family chooses them, or as the engine chose them when it sampled (routing replay).

Without replay trainer and engine may send a token to different experts, because their router logits differ by rounding; the log-prob of a
token then jumps (R3, arXiv:2510.11370). With it, the trainer's router computes its own weights, with gradients, for the engine's choice.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from slime.models.parts.feed_forward import Groups
from slime.types import NOT_RECORDED

TopK = Callable[..., tuple[Tensor, Tensor]]


class ExpertChoice:
    """What megatron-core's router asks for its top-k (its `router_replay` hook)."""

    def __init__(self, groups: Groups | None) -> None:
        self.groups = groups
        self.recorded: Tensor | None = None  # int64 [tokens, k], of the forward pass that comes next
        self.padding: Tensor | None = None  # bool [tokens], of that pass
        self.of_padding: Tensor | float = 0.0  # [experts], how often that pass chose each for padding
        self.replayed: Tensor | float = 0.0  # tokens that had recorded experts, since the last `take_counts`
        self.changed: Tensor | float = 0.0  # of those, the ones that would have gone to others

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK
    ) -> tuple[Tensor, Tensor]:
        """(scores, expert ids), both [tokens, k], from scores [tokens, experts]."""
        assert num_groups is None and group_topk is None, "groups are chosen here"
        chosen = torch.topk(self._within_groups(scores), topk, dim=1).indices
        if self.recorded is not None:
            assert self.recorded.shape == chosen.shape, (self.recorded.shape, chosen.shape)
            is_recorded = self.recorded[:, 0] != NOT_RECORDED
            differs = (self.recorded.sort(1).values != chosen.sort(1).values).any(1)
            self.replayed = self.replayed + is_recorded.sum()
            self.changed = self.changed + (is_recorded & differs).sum()
            chosen = torch.where(is_recorded[:, None], self.recorded, chosen)
        if self.padding is not None:
            self.of_padding = torch.zeros_like(scores).scatter_(1, chosen, 1.0).mul_(self.padding[:, None]).sum(0)
        return scores.gather(1, chosen), chosen

    def _within_groups(self, scores: Tensor) -> Tensor:
        """The scores, -inf for experts outside the best groups."""
        if self.groups is None:
            return scores
        grouped = scores.view(len(scores), self.groups.count, -1)
        best = grouped.amax(-1) if self.groups.score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(self.groups.chosen, dim=1).indices, True)
        return grouped.masked_fill(~kept[..., None], -torch.inf).view_as(scores)


class ExpertLayer(TransformerLayer):
    """A layer with experts. Its router is told of the recorded choice at every forward pass, so that a recomputed one sees the same. The
    load that moves a router's bias is that of tokens: megatron-core counts padding too, how much of it depends on the layout."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        router, packing = self.mlp.router, kwargs["packed_seq_params"]
        choice = router.router_replay
        choice.recorded, choice.padding = packing.experts_of(self.layer_number - 1), packing.padding
        out = super().forward(*args, **kwargs)
        if router.expert_bias is not None and torch.is_grad_enabled():  # when megatron-core counts
            router.local_tokens_per_expert -= choice.of_padding
        return out


def install(model: torch.nn.Module, groups: Groups | None) -> None:
    """Give every router of a megatron-core model its `ExpertChoice`."""
    for module in model.modules():
        if isinstance(module, ExpertLayer):
            module.mlp.router.router_replay = ExpertChoice(groups)


def take_counts(models: Iterable[torch.nn.Module]) -> tuple[float, float]:
    """(tokens with recorded experts, those that would have gone to others), over this rank's layers since the last call."""
    replayed, changed = 0.0, 0.0
    for model in models:
        for module in model.modules():
            if isinstance(module, ExpertLayer):
                choice = module.mlp.router.router_replay
                replayed, changed = replayed + float(choice.replayed), changed + float(choice.changed)
                choice.replayed = choice.changed = 0.0
    return replayed, changed
