"""algorithm: the tensor math of the loss.

Which of these knobs an algorithm reads is in `slime.config.algorithms`; the others are refused with it.
"""

from dataclasses import dataclass, field
from typing import Any

from slime.config.fields import choice, number


@dataclass
class TeacherConfig:
    path: str = "???"
    """Hugging Face directory, or a name on the hub. Held on the actor's ranks, unless it has a url or cluster.roles.teacher/<name>."""
    url: str | None = None
    """SGLang server of yours that serves it, at rollout.temperature=1 only. A request that fails three times ends the run."""
    key_env: str | None = None
    """Environment variable with the API key of the server."""
    tensor_parallel: int = number(1, low=1)
    """Devices of one server of cluster.roles.teacher/<name>. One that ends is started anew, up to rollout.max_restarts times in a run."""
    sources: list[str] = field(default_factory=list)
    """Sources of data.train that it teaches; a teacher alone teaches all."""


@dataclass
class AlgorithmConfig:
    name: str = "grpo"
    """grpo, rloo, reinforce_pp, reinforce_pp_baseline, ppo, gspo, cispo, opd, sft, or pkg.mod:fn that builds an Algorithm of your own."""
    aggregation: str = choice("token", "sequence", "constant")
    """Mean over tokens, mean of sequence means, or sum over a constant length (Dr.GRPO); always over the whole update."""
    # Advantages
    normalize: bool = True
    """Divide advantages by the standard deviation of their group (Dr.GRPO: false); reinforce_pp and ppo whiten over the batch's tokens."""
    gamma: float = number(1.0, low=0, high=1)
    """What a reward one token later counts."""
    lam: float = number(1.0, low=0, high=1)
    """ppo: GAE's lambda: 1 trusts returns, 0 the critic."""
    # Policy loss
    clip_low: float | None = number(None, low=0, high=1)
    """The ratio counts from 1 - clip_low on. By default 0.2; gspo 0.0003; cispo 1."""
    clip_high: float | None = number(None, low=0)
    """The ratio counts up to 1 + clip_high. By default clip_low (DAPO: 0.28); gspo 0.0004; cispo 4."""
    clip_dual: float | None = number(None, above=1)
    """The ratio counts up to this where the advantage is negative; above 1, usually 3."""
    entropy_coef: float = number(0.0, low=0)
    """Weight of the entropy bonus."""
    # KL to a reference
    reference_every: int = number(0, low=0)
    """Updates after which the reference becomes the current policy; 0: it stays the model that the run began from."""
    kl_loss_coef: float = number(0.0, low=0)
    """Weight of the KL to the reference policy in the loss."""
    kl_reward_coef: float = number(0.0, low=0)
    """Weight of the KL to the reference policy in every token's reward."""
    kl_estimator: str = choice("auto", "k1", "k2", "k3", "unbiased")
    """auto has the reverse KL's gradient: k1 in the reward, k2 in the loss; there k3 has the forward KL's. unbiased: k3 times the ratio."""
    # Tokens that another policy drew
    importance: str = choice("none", "token", "sequence", "geometric")
    """Weigh tokens by the trainer's over the engine's probability: of the token, of its sequence, or its sequence's geometric mean."""
    importance_low: float = number(0.0, low=0)
    """Lower bound, at which weights are held."""
    importance_high: float = number(2.0, above=0)
    """Upper bound, at which weights are held (TIS)."""
    importance_reject: dict[str, list[Any]] = field(default_factory=dict)  # as list[float], OmegaConf takes no whole number in it
    """level (token, sequence, geometric, lowest) -> [low, high]: tokens weigh 0 where its ratio lies outside. IcePop: {token: [0.5, 5]}."""
    importance_normalize: bool = False
    """Divide the weights, which are 0 where something is rejected, by their mean over the batch's tokens."""
    opsm_delta: float | None = number(None, above=0)
    """Drop tokens of negative advantage where the mean of log engine - log trainer over their sequence is above this (DeepSeek: 1e-4)."""
    # Distillation
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by name; each source of prompts has one."""
    distill: str = choice("none", "sampled", "topk", "full")
    """From teachers: the reverse KL at the tokens drawn, as an advantage; or, as a loss, a divergence over their top tokens or all."""
    distill_coef: float = number(1.0, above=0)
    """Its weight."""
    distill_beta: float = number(1.0, low=0, high=1)
    """topk and full: 1 is KL(student || teacher), 0 KL(teacher || student), between them GKD's Jensen-Shannon divergence."""
    distill_top_k: int = number(16, low=1)
    """topk: tokens of the teacher's distribution; all others together are one more."""
