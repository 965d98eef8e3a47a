"""Which experts a token goes to, without a model."""

import pytest
import torch

from slime.models.parts.feed_forward import Groups
from slime.trainer.routing import ExpertChoice
from slime.types import NOT_RECORDED


def ask(choice: ExpertChoice, scores: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    return choice.get_replay_topk(scores, topk, None, None, lambda *_: pytest.fail("the default is not asked"))


def by_hand(scores: torch.Tensor, topk: int, groups: Groups) -> list[set[int]]:
    """The experts of each token, one token and one group at a time."""
    chosen = []
    for row in scores.tolist():
        size = len(row) // groups.count
        parts = [sorted(row[i * size : (i + 1) * size], reverse=True) for i in range(groups.count)]
        worth = [part[0] if groups.score == "max" else part[0] + part[1] for part in parts]
        best = sorted(range(groups.count), key=lambda i: -worth[i])[: groups.chosen]
        within = [expert for expert in range(len(row)) if expert // size in best]
        chosen.append(set(sorted(within, key=lambda expert: -row[expert])[:topk]))
    return chosen


@pytest.mark.parametrize("groups", [Groups(4, 2, "max"), Groups(4, 2, "top2"), Groups(2, 1, "top2"), Groups(3, 2, "max")])
def test_experts_are_chosen_within_the_best_groups(groups: Groups) -> None:
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    found, chosen = ask(ExpertChoice(groups), scores, 3)
    assert [set(row) for row in chosen.tolist()] == by_hand(scores, 3, groups)
    torch.testing.assert_close(found, scores.gather(1, chosen))


def test_recorded_experts_are_taken_and_the_others_counted() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]] * 4, requires_grad=True)
    choice = ExpertChoice(None)
    choice.recorded = torch.tensor([[2, 1], [0, 3], [NOT_RECORDED, NOT_RECORDED], [1, 2]])
    found, chosen = ask(choice, scores, 2)
    assert chosen.tolist() == [[2, 1], [0, 3], [1, 2], [1, 2]]
    assert (float(choice.replayed), float(choice.changed)) == (3, 1)  # [2, 1] are the trainer's own [1, 2]
    found[1].sum().backward()
    assert scores.grad is not None and scores.grad[1].tolist() == [1, 0, 0, 1]
