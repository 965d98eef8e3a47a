"""Teachers: there are some where something is learned from them, each source of prompts has one, and they can say what is asked."""

import re
from collections import Counter

from slime.config import SlimeConfig
from slime.config.algorithm import AlgorithmConfig, TeacherConfig
from slime.config.check_inert import changed
from slime.config.exits import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def check_teachers(cfg: SlimeConfig) -> None:
    """Raises ConfigError. Which sources the rows of data.train name is found out when they are read."""
    algorithm = cfg.algorithm
    teachers = algorithm.teachers
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
    held = [name for name, teacher in teachers.items() if teacher.url is None]
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
    if teacher.url is None:
        if teacher.key_env is not None:
            raise ConfigError(f"{at}.key_env={teacher.key_env} has no effect without {at}.url: remove it")
        return
    if changed(teacher, "family"):
        raise ConfigError(f"{at}.family={teacher.family} has no effect with {at}.url, whose server knows its model: remove it")
    if cfg.algorithm.distill == "full":
        raise ConfigError(
            f"{at}.url={teacher.url} with algorithm.distill=full: a server does not give the whole distribution of every token; "
            f"choose topk or sampled, or remove {at}.url so that the actor's ranks hold the teacher"
        )
    if cfg.rollout.temperature != 1:
        raise ConfigError(
            f"{at}.url={teacher.url} with rollout.temperature={cfg.rollout.temperature:g}: SGLang gives log-probs of given tokens at "
            f"temperature 1 alone; set rollout.temperature=1, or remove {at}.url so that the actor's ranks hold the teacher"
        )
