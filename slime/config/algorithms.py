"""What the built-in algorithms read and need: facts for checks that must not import torch. `slime.algorithms.registry` builds them."""

from dataclasses import dataclass

# No real update changes a token's probability by e^20 = 5e8. Beyond that a ratio is held and passes no gradient: one such token would
# drown all others in fp32 sums, and from e^88 on exp() is inf, with NaN in the backward pass.
MAX_LOG_RATIO = 20.0
REJECT_LEVELS = ("token", "sequence", "geometric", "lowest")  # of algorithm.importance_reject


@dataclass(frozen=True)
class Traits:
    """Of one algorithm."""

    reads: frozenset[str]  # knobs of `algorithm` that change what it computes
    needs_rollouts: bool = True  # False: it learns from demonstrations
    compares: bool = False  # answers to one prompt with each other: a group needs two
    critic: bool = False
    rewarded: bool = True  # False: rewards play no part in what it learns


def _reads(*parts: str) -> frozenset[str]:
    return frozenset(" ".join(parts).split())


ALWAYS = "name aggregation"
LOSS = "clip_low clip_high clip_dual"
TERMS = (
    "entropy_coef kl_loss_coef kl_estimator reference_every importance importance_low importance_high "
    "importance_reject importance_normalize opsm_delta "
    "teachers distill distill_coef distill_beta distill_top_k"
)
REWARDED = "kl_reward_coef normalize"

ALGORITHMS = {
    "grpo": Traits(_reads(ALWAYS, TERMS, LOSS, "normalize"), compares=True),
    "rloo": Traits(_reads(ALWAYS, TERMS, LOSS), compares=True),
    "reinforce_pp": Traits(_reads(ALWAYS, TERMS, LOSS, REWARDED, "gamma")),
    "reinforce_pp_baseline": Traits(_reads(ALWAYS, TERMS, LOSS, REWARDED), compares=True),
    "ppo": Traits(_reads(ALWAYS, TERMS, LOSS, REWARDED, "gamma lam"), critic=True),
    "gspo": Traits(_reads(ALWAYS, TERMS, LOSS, "normalize"), compares=True),
    "cispo": Traits(_reads(ALWAYS, TERMS, "clip_low clip_high normalize"), compares=True),
    "opd": Traits(_reads(ALWAYS, TERMS, LOSS), rewarded=False),
    "sft": Traits(_reads(ALWAYS), needs_rollouts=False, rewarded=False),
}
