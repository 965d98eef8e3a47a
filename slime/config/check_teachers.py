"""Teachers: there are some where something is learned from them, each source of prompts has one, and they can say what is asked."""

import os
import re
from collections import Counter

from slime.config import SlimeConfig
from slime.config.algorithm import AlgorithmConfig, TeacherConfig
from slime.config.check_inert import changed
from slime.config.exits import ConfigError
from slime.config.roles import TEACHER, generates, held_teachers, served_teachers, teacher_role
from slime.config.tree import nearest

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def check_teachers(cfg: SlimeConfig) -> None:
    """Raises ConfigError. Which sources the rows of data.train name is found out when they are read."""
    algorithm = cfg.algorithm
    teachers = algorithm.teachers
    _check_roles(cfg)
    if algorithm.distill == "none":
        if teachers:
            raise ConfigError(
                f"algorithm.teachers ({', '.join(teachers)}) has no effect with algorithm.distill=none: set algorithm.distill"
            )
        return
    if not teachers:
        raise ConfigError(f"algorithm.distill={algorithm.distill} without a teacher: set algorithm.teachers.<name>.path")
    _check_sources(algorithm)
    for name, teacher in teachers.items():
        _check_one(cfg, f"algorithm.teachers.{name}", name, teacher)
    held = held_teachers(cfg)
    if algorithm.distill == "full" and held and cfg.trainer.pipeline_parallel > 1:
        raise ConfigError(
            f"algorithm.distill=full with trainer.pipeline_parallel={cfg.trainer.pipeline_parallel}: a teacher's logits are compared where "
            "they are computed, on ranks that hold it whole or by tensor parallelism; set trainer.pipeline_parallel=1, or choose topk"
        )


def _check_sources(algorithm: AlgorithmConfig) -> None:
    teachers = algorithm.teachers
    for name, teacher in teachers.items():
        if len(teachers) > 1 and not teacher.sources:
            raise ConfigError(f"algorithm.teachers.{name}.sources is empty beside other teachers: name the sources that it teaches")
    counts = Counter(source for teacher in teachers.values() for source in teacher.sources)
    for source, count in counts.items():
        if count > 1:
            named = " and ".join(name for name, teacher in teachers.items() if source in teacher.sources)
            raise ConfigError(f"algorithm.teachers: {named} teach source {source}; give it to one of them")


def _check_one(cfg: SlimeConfig, at: str, name: str, teacher: TeacherConfig) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{at}: a teacher's name is of a-z, 0-9, _ and -")
    if teacher.url is None and teacher.key_env is not None:
        raise ConfigError(f"{at}.key_env={teacher.key_env} has no effect without {at}.url: remove it")
    if changed(teacher, "tensor_parallel") and (teacher.url is not None or name not in served_teachers(cfg)):
        raise ConfigError(
            f"{at}.tensor_parallel={teacher.tensor_parallel} has no effect on a teacher that slime does not serve: remove it, or let slime "
            f"serve it on cluster.roles.{teacher_role(name)}.devices"
        )
    if name not in served_teachers(cfg):
        return
    if teacher.url is not None:
        _check_url(cfg, at, teacher)
    by = f"{at}.url={teacher.url}" if teacher.url is not None else f"cluster.roles.{teacher_role(name)}"
    away = by.partition("=")[0]
    if cfg.algorithm.distill == "full":
        raise ConfigError(
            f"{by} with algorithm.distill=full: a server does not give the whole distribution of every token; "
            f"choose topk or sampled, or remove {away} so that the actor's ranks hold the teacher"
        )
    if cfg.rollout.temperature != 1:
        raise ConfigError(
            f"{by} with rollout.temperature={cfg.rollout.temperature:g}: SGLang gives log-probs of given tokens at "
            f"temperature 1 alone; set rollout.temperature=1, or remove {away} so that the actor's ranks hold the teacher"
        )


def _check_url(cfg: SlimeConfig, at: str, teacher: TeacherConfig) -> None:
    """A server of the user's."""
    if not re.fullmatch(r"https?://[^/\s:]+(:\d+)?/?", str(teacher.url)):
        raise ConfigError(f"{at}.url={teacher.url}: not http://host:port")
    if cfg.run.deterministic:
        raise ConfigError(
            f"run.deterministic=true with {at}.url: slime did not start that server and cannot fix its threads and batches; remove "
            f"{at}.url, so that the actor's ranks hold the teacher, or let slime serve it on cluster.roles"
        )
    if teacher.key_env is not None and generates(cfg) and teacher.key_env not in os.environ:
        raise ConfigError(
            f"{at}.key_env={teacher.key_env}: no environment variable has this name; export it with the server's key (the knob is its name "
            "alone)"
        )


def _check_roles(cfg: SlimeConfig) -> None:
    """Roles of teachers that slime serves: each has its teacher, which has no other server."""
    teachers = cfg.algorithm.teachers
    for role in cfg.cluster.roles:
        name = role.removeprefix(TEACHER)
        if role == name:
            continue
        if name not in teachers:
            raise ConfigError(f"cluster.roles.{role}: there is no algorithm.teachers.{name}{nearest(name, list(teachers))}")
        if (url := teachers[name].url) is not None:
            raise ConfigError(f"cluster.roles.{role} has no effect with algorithm.teachers.{name}.url={url}: remove one of them")
