"""cluster.share: what trainer and engines on the same devices do not go with.

`split` asks little: as many devices of the one as of the other, and engines of slime's own. With `swap` engines have no memory while the
trainer works: nothing may ask them anything then, nor the trainer anything while they generate, and weights come to them whole, from their
hosts, after each publication.
"""

from slime.config import SlimeConfig
from slime.config.check_inert import changed, setting
from slime.config.exits import ConfigError
from slime.config.roles import held_teachers, reads_groups, shares, swaps

FRACTION = "mem_fraction_static"  # of rollout.sglang: the part of a device that an engine takes for weights and KV cache
SWAP_ON_GPU = "a CPU engine has no memory that it could give back; set cluster.share=split, or none"
REGISTERED = "nccl_ub"  # of trainer.megatron: buffers whose addresses NCCL keeps


def check_share(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first thing that does not go with cluster.share."""
    share, rollout = cfg.cluster.share, cfg.rollout
    if share == "none":
        return
    if rollout.external_urls:
        raise ConfigError(
            f"cluster.share={share} with rollout.external_urls, whose servers have devices of their own: set cluster.share=none, or "
            "remove the urls"
        )
    if not shares(cfg):  # a run of one half alone, or from demonstrations
        return
    actor, engines = (cfg.cluster.roles[role].devices for role in ("actor", "rollout"))
    if actor != engines:
        raise ConfigError(
            f"cluster.share={share} with cluster.roles.actor.devices={actor} and cluster.roles.rollout.devices={engines}: ranks and "
            "engines sit on the same devices; make them equal"
        )
    fraction = rollout.sglang.get(FRACTION)
    if fraction is not None and (isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1):
        raise ConfigError(f"rollout.sglang.{FRACTION}={fraction}: takes a number above 0 and below 1")
    if swaps(cfg):
        _swap(cfg)


def _swap(cfg: SlimeConfig) -> None:
    rollout, sync = cfg.rollout, cfg.sync
    if rollout.mode != "sync":
        raise ConfigError(
            f"cluster.share=swap with rollout.mode={rollout.mode}: engines would generate while the trainer has their memory; set "
            "rollout.mode=sync, or cluster.share=split"
        )
    if cfg.cluster.device == "cpu":
        raise ConfigError(f"cluster.share=swap with cluster.device=cpu: {SWAP_ON_GPU}")
    if cfg.run.deterministic:
        raise ConfigError("cluster.share=swap with run.deterministic=true, which is of the CPU: set cluster.share=split, or none")
    if rollout.join is not None:
        raise ConfigError(
            f"cluster.share=swap with rollout.join={rollout.join}: a server of yours keeps its memory and would miss the weights; remove it"
        )
    if reads_groups(cfg):
        name = held_teachers(cfg)[0]
        raise ConfigError(
            f"cluster.share=swap with algorithm.teachers.{name} on the actor's ranks and algorithm.distill={cfg.algorithm.distill}: it "
            f"would read answers while engines have the memory; give it devices (cluster.roles.teacher/{name}) or a url, or set "
            "algorithm.distill=full"
        )
    for knob in ("pause", "on_mismatch"):
        if changed(sync, knob):
            raise ConfigError(
                f"{setting(cfg, f'sync.{knob}')} has no effect with cluster.share=swap, where engines are loaded whole when they get "
                "their memory back: remove it"
            )
    if cfg.trainer.megatron.get(REGISTERED):
        raise ConfigError(
            f"trainer.megatron.{REGISTERED}=true with cluster.share=swap: NCCL would keep the addresses of memory that is given away; "
            "remove it"
        )
