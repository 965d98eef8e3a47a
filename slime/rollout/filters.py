"""Filters of groups for rollout.filter: fn(group) -> bool. A group that is rejected is dropped, counted, and replaced by a new prompt."""

from slime.types import Group


def mixed_rewards(group: Group) -> bool:
    """Keep groups whose rewards differ: equal ones have no advantage (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).
    The rewards are as judged, without penalties for length: the paper's condition counts right answers (eq. 11).

    rollout.filter=slime.rollout.filters:mixed_rewards
    """
    rewards = group.rewards
    return max(rewards) > min(rewards)
