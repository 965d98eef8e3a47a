"""Options that contradict each other, or that would do nothing beside others. Nothing is ignored silently."""

import os
import re

from slime.config import EvalSet, SlimeConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.check_algorithm import check_algorithm
from slime.config.check_critic import check_critic
from slime.config.check_inert import changed, check_inert
from slime.config.check_steps import check_steps
from slime.config.check_sync import check_sync
from slime.config.check_teachers import check_teachers
from slime.config.exits import ConfigError
from slime.config.of_critic import optimizer_steps
from slime.config.roles import TEACHER, needed_roles, needs_rollouts
from slime.config.trainer import decay_length
from slime.config.tree import nearest, type_of

ROLES = ("actor", "critic", "rollout")
CPU_ONLY = "equal bits are promised on the CPU only; set cluster.device=cpu"


def check_combinations(cfg: SlimeConfig) -> None:
    """Raise ConfigError for the first contradiction or option without effect."""
    _run(cfg)
    _stopping(cfg)
    check_inert(cfg)
    _deterministic(cfg)
    _algorithm(cfg)
    _rollout(cfg)
    _reward(cfg)
    _schedule(cfg)
    _evaluation(cfg)
    _cluster(cfg)
    check_sync(cfg)


def _inert(setting: str, because: str, mend: str) -> ConfigError:
    return ConfigError(f"{setting} has no effect with {because}: {mend}")


def _run(cfg: SlimeConfig) -> None:
    run = cfg.run
    if run.only == "train" and run.replay is None:
        raise ConfigError("run.only=train reads rollouts from a directory: set run.replay to one that rollout.dump=true wrote")
    if run.replay is not None and run.only != "train":
        raise _inert(f"run.replay={run.replay}", f"run.only={run.only}", "set run.only=train, or unset run.replay")
    if run.only == "rollout" and not needs_rollouts(cfg.algorithm):
        raise ConfigError(
            f"run.only=rollout with algorithm.name={cfg.algorithm.name}: it learns from demonstrations and generates nothing; "
            "choose another algorithm.name"
        )
    if run.only == "rollout" and not cfg.rollout.dump:
        raise ConfigError("run.only=rollout without rollout.dump=true would throw all rollouts away: set rollout.dump=true")
    if run.only == "rollout" and cfg.rollout.join is not None:
        raise _inert(f"rollout.join={cfg.rollout.join}", "run.only=rollout, which publishes no weights", "remove it")
    if run.name is not None and not re.fullmatch(r"[\w.+=,@-]+", run.name):
        raise ConfigError(f"run.name={run.name}: names one directory below run.dir; use letters, digits and . _ - + = , @")


def _stopping(cfg: SlimeConfig) -> None:
    run = cfg.run
    if run.max_hours and run.max_hours * 3600 <= run.grace_s:
        raise ConfigError(
            f"run.max_hours={run.max_hours:g} is {run.max_hours * 3600:g} s, and the run stops run.grace_s={run.grace_s:g} s before: "
            "raise it, or lower run.grace_s"
        )
    for name in run.accept_changes:
        if "." not in name:
            raise ConfigError(f"run.accept_changes: {name} is no knob; name each, as in run.accept_changes='[trainer.lr]'")
        try:
            type_of(name)
        except ConfigError as error:
            raise ConfigError(f"run.accept_changes: {error}") from error


def _deterministic(cfg: SlimeConfig) -> None:
    if not cfg.run.deterministic:
        return
    if cfg.rollout.select == "arrival":
        raise ConfigError("run.deterministic=true with rollout.select=arrival: arrival order depends on timing; set rollout.select=ordinal")
    if cfg.cluster.device == "cuda":
        raise ConfigError(f"run.deterministic=true with cluster.device=cuda: {CPU_ONLY}")
    if cfg.rollout.external_urls:
        raise ConfigError(
            "run.deterministic=true with rollout.external_urls: slime did not start those servers and cannot fix their threads and "
            "batches; unset rollout.external_urls"
        )
    if cfg.rollout.join is not None:
        raise ConfigError("run.deterministic=true with rollout.join: when a server joins decides which one answers; unset rollout.join")


def _algorithm(cfg: SlimeConfig) -> None:
    check_algorithm(cfg.algorithm)
    check_teachers(cfg)
    check_critic(cfg)
    check_steps(cfg)
    traits = ALGORITHMS.get(cfg.algorithm.name)
    if traits and traits.compares and cfg.rollout.samples_per_prompt < 2 and cfg.run.only != "rollout":
        raise ConfigError(
            f"rollout.samples_per_prompt={cfg.rollout.samples_per_prompt} with algorithm.name={cfg.algorithm.name}: a group of one has no "
            "advantage; set at least 2"
        )


def _rollout(cfg: SlimeConfig) -> None:
    rollout = cfg.rollout
    if rollout.external_key_env is not None:
        _external_key(rollout.external_key_env, [*rollout.external_urls, *([rollout.join] if rollout.join else [])])
    for url in rollout.external_urls:
        if not re.fullmatch(r"https?://[^/\s:]+(:\d+)?/?", url):
            raise ConfigError(f"rollout.external_urls: {url!r} is not http://host:port")
    if rollout.external_urls:
        of_teachers = ("engine_python", "sglang") if any(role.startswith(TEACHER) for role in needed_roles(cfg)) else ()
        for knob in ("engines", "tensor_parallel", "engine_python", "sglang"):
            if changed(rollout, knob) and knob not in of_teachers:
                raise _inert(f"rollout.{knob}", "rollout.external_urls, whose servers run already", f"remove rollout.{knob}, or the urls")
        role = cfg.cluster.roles.get("rollout")
        if role is not None and changed(role, "devices"):
            raise _inert(
                f"cluster.roles.rollout.devices={role.devices}",
                "rollout.external_urls, whose servers have devices of their own",
                "remove it, or the urls",
            )
    if rollout.select != "arrival" and changed(rollout, "oversample"):
        raise _inert(
            f"rollout.oversample={rollout.oversample:g}", f"rollout.select={rollout.select}", "set rollout.select=arrival, or remove it"
        )
    if "" in rollout.stop:
        raise ConfigError("rollout.stop has an empty string, which would end every answer at once: remove it")


def _external_key(name: str, urls: list[str]) -> None:
    knob = f"rollout.external_key_env={name}"
    if not urls:
        raise _inert(knob, "no rollout.external_urls", "set rollout.external_urls or rollout.join, or remove it")
    if name not in os.environ:
        raise ConfigError(f"{knob}: no environment variable has this name; export it with the servers' key (the knob is its name alone)")


def _reward(cfg: SlimeConfig) -> None:
    reward = cfg.reward
    if reward.url is not None:
        if not re.fullmatch(r"https?://\S+", reward.url):
            raise ConfigError(f"reward.url={reward.url}: not an http:// or https:// address")
        for knob in ("fn", "signature"):
            if changed(reward, knob):
                raise _inert(f"reward.{knob}={getattr(reward, knob)}", "reward.url", "set one of the two")
    functions = {} if reward.url else {"reward.fn": reward.fn}
    functions |= {f"data.eval.{name}.reward": chosen.reward for name, chosen in cfg.data.eval.items() if chosen.reward}
    format_by = next((knob for knob, fn in functions.items() if fn == "format"), None)
    named = ", ".join(f"{knob}={fn}" for knob, fn in functions.items()) or "reward.url"
    if reward.pattern is not None and format_by is None:
        raise _inert(f"reward.pattern={reward.pattern}", named, "set reward.fn=format, or remove reward.pattern")
    if format_by is not None and reward.pattern is None:
        raise ConfigError(f"{format_by}=format judges by a regular expression: set reward.pattern")
    if reward.pattern is not None:
        try:
            re.compile(reward.pattern)
        except re.error as error:
            raise ConfigError(f"reward.pattern={reward.pattern}: not a regular expression: {error}") from error
    _overlong(cfg)
    if changed(reward, "signature") and not any(":" in fn for fn in functions.values()):
        raise _inert(f"reward.signature={reward.signature}", f"{named}, which is built in", "remove reward.signature")


def _overlong(cfg: SlimeConfig) -> None:
    buffer, longest, traits = cfg.reward.overlong_buffer, cfg.rollout.max_response_tokens, ALGORITHMS.get(cfg.algorithm.name)
    if changed(cfg.reward, "overlong_penalty") and not buffer:
        raise _inert(
            f"reward.overlong_penalty={cfg.reward.overlong_penalty:g}", "reward.overlong_buffer=0", "set it, or remove the penalty"
        )
    if buffer > longest:
        raise ConfigError(
            f"reward.overlong_buffer={buffer} is above rollout.max_response_tokens={longest}, whose last tokens it is: lower it"
        )
    if buffer and traits and not traits.rewarded:
        raise _inert(f"reward.overlong_buffer={buffer}", f"algorithm.name={cfg.algorithm.name}, which learns from no reward", "remove it")


def _schedule(cfg: SlimeConfig) -> None:
    trainer = cfg.trainer
    updates = optimizer_steps(cfg)
    batches = "(run.steps - critic.warmup_steps)" if cfg.critic.warmup_steps else "run.steps"
    total = f"the run's {updates} optimizer steps ({batches} x trainer.updates_per_batch x trainer.epochs_per_batch)"
    if trainer.schedule == "constant":
        for knob in ("decay_steps", "min_lr"):
            if changed(trainer, knob):
                raise _inert(
                    f"trainer.{knob}={getattr(trainer, knob):g}",
                    "trainer.schedule=constant",
                    "set trainer.schedule to cosine or wsd, or remove it",
                )
    least = 2 if trainer.schedule == "wsd" else 1  # a decay begins at trainer.lr, and one step of it would be none
    if trainer.decay_steps is not None and trainer.decay_steps < least:
        raise ConfigError(f"trainer.decay_steps={trainer.decay_steps}: must be at least {least}")
    if trainer.min_lr > trainer.lr:
        raise ConfigError(f"trainer.min_lr={trainer.min_lr:g} is above trainer.lr={trainer.lr:g}, the peak: lower it")
    if trainer.warmup_steps >= updates:
        raise ConfigError(f"trainer.warmup_steps={trainer.warmup_steps} leaves nothing of {total}: lower it")
    decay = decay_length(trainer, updates)
    if trainer.schedule == "wsd" and trainer.warmup_steps + decay > updates:
        given = f"trainer.decay_steps={decay}" + (" (its default, a tenth)" if trainer.decay_steps is None else "")
        raise ConfigError(f"trainer.warmup_steps={trainer.warmup_steps} + {given} exceed {total}: lower one")


def _evaluation(cfg: SlimeConfig) -> None:
    if cfg.run.eval_every and not cfg.data.eval:
        raise _inert(
            f"run.eval_every={cfg.run.eval_every}", "no data.eval", "add a set (data.eval.<name>.path=...), or set run.eval_every=0"
        )
    for name, chosen in cfg.data.eval.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"data.eval: the name {name!r} becomes part of metric names; use letters, digits and . _ -")
        _eval_set(f"data.eval.{name}", chosen)


def _eval_set(path: str, chosen: EvalSet) -> None:
    for knob in ("max_response_tokens", "limit"):
        value = getattr(chosen, knob)
        if value is not None and value < 1:
            raise ConfigError(f"{path}.{knob}={value}: must be at least 1")
    if chosen.temperature == 0 and chosen.samples > 1:
        raise _inert(
            f"{path}.samples={chosen.samples}", f"{path}.temperature=0, where all answers are the same", f"set {path}.temperature above 0"
        )
    if chosen.temperature == 0 and chosen.top_p < 1:
        raise _inert(f"{path}.top_p={chosen.top_p:g}", f"{path}.temperature=0, which is greedy", f"set {path}.temperature above 0")


def _cluster(cfg: SlimeConfig) -> None:
    cluster = cfg.cluster
    for role in cluster.roles:
        if role not in ROLES and not role.startswith(TEACHER):  # see check_teachers
            raise ConfigError(f"cluster.roles.{role}: no such role; there are {', '.join(ROLES)}{nearest(role, ROLES)}")
    for role in needed_roles(cfg):
        if role not in cluster.roles:
            raise ConfigError(f"cluster.roles has no {role}, which this recipe needs: set cluster.roles.{role}.devices")
    if cluster.address is not None and changed(cluster, "object_store_mb"):
        raise _inert(f"cluster.object_store_mb={cluster.object_store_mb}", "cluster.address, whose Ray runs already", "remove it")
