"""Groups of experts that a router chooses within."""

from slime.models.config_json import ConfigJson
from slime.models.parts.feed_forward import Groups


def by_best_two(config: ConfigJson) -> Groups:
    """`topk_group` of `n_group` groups, each scored by the sum of its two best experts (DeepSeek-V3, section 2.1.2)."""
    return Groups(config.integer("n_group"), config.integer("topk_group"), "top2")
