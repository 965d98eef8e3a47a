"""Filters of groups for rollout.filter: fn(group) -> bool. A group that is rejected is dropped, counted, and replaced by a new prompt."""

import statistics

from slime.types import Group

LEAST_STD = 1e-6  # of rewards: less is rounding, and the advantages are divided by no less


def mixed_rewards(group: Group) -> bool:
    """Keep groups whose rewards differ, by more than rounding does: equal ones have no advantage (DAPO's dynamic sampling, arXiv
    2503.14476, section 3.2).
    The rewards are as judged, without penalties for length: the paper's condition counts right answers (eq. 11).

    rollout.filter=slime.rollout.filters:mixed_rewards
    """
    rewards = group.rewards
    return len(rewards) > 1 and statistics.stdev(rewards) > LEAST_STD
