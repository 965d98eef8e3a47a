"""What overlong answers cost in training: DAPO's soft penalty and its overlong filtering (arXiv 2503.14476, section 3.4). Pure."""

from slime.config import SlimeConfig
from slime.types import Group


def overlong_penalty(length: int, longest: int, buffer: int, penalty: float) -> float:
    """What is added to the reward of an answer of `length` tokens, at most 0 (eq. 13, with L_cache = buffer and L_max = longest):

    0                                             length <= longest - buffer
    penalty * (longest - buffer - length) / buffer         in between: linear over the buffer
    -penalty                                      longest < length
    """
    return penalty * max(min((longest - buffer - length) / buffer, 0.0), -1.0)


def shape(group: Group, cfg: SlimeConfig) -> Group:
    """Set what the recipe says of overlong answers, on the samples themselves: `penalty` by reward.overlong_buffer, and by
    rollout.mask_truncated a loss mask of 0 where an answer was cut off; it still counts among the rewards of its group."""
    buffer, longest = cfg.reward.overlong_buffer, cfg.rollout.max_response_tokens
    for s in group.samples:
        if buffer:
            s.penalty = overlong_penalty(len(s.response_ids), longest, buffer, cfg.reward.overlong_penalty)
        if cfg.rollout.mask_truncated and s.truncated:
            s.loss_mask = [0] * len(s.response_ids)
    return group


def teaches(group: Group) -> bool:
    """Whether any token of it is trained on."""
    return any(any(s.loss_mask) for s in group.samples)
