"""Recipes with teachers that SGLang serves: which roles they need, and what is refused, each with its exact error text."""

# ruff: noqa: E501

import pytest

from slime.config import SlimeConfig
from slime.config.checks import check
from slime.config.exits import ConfigError
from slime.config.overrides import RECIPES, prepare_override
from slime.config.plan import plan
from slime.config.roles import needed_roles, reads_groups, role_needs, served_teachers
from tests.config.composing import composed

BASE = ["model.path=model", "data.train=[{path: p.jsonl}]", "algorithm.distill=topk"]
ONE = "algorithm.teachers.math.path=t"
URL = "algorithm.teachers.math.url=http://h:1"
ROLE = "cluster.roles.teacher/math.devices=2"


def recipe(*overrides: str) -> SlimeConfig:
    return composed(*BASE, *overrides)


def test_who_is_served(workdir) -> None:
    """By the user, by slime, or by nobody."""
    paths = {"math": "math", "code": "code", "chat": "model"}  # of the last one memory is planned
    three = [f"algorithm.teachers.{name}.{knob}" for name, path in paths.items() for knob in (f"path={path}", f"sources=[{name}]")]
    cfg = recipe(
        *three, URL, "cluster.roles.teacher/code.devices=4", "algorithm.teachers.code.tensor_parallel=2", "cluster.cpus_per_engine=3"
    )
    check(cfg)
    assert served_teachers(cfg) == {"math", "code"}
    assert needed_roles(cfg) == ("actor", "rollout", "teacher/code")
    need = role_needs(cfg)["teacher/code"]
    assert (need.devices, need.cpus) == (4, 3.0)
    assert "teacher/code" in plan(cfg).roles


@pytest.mark.parametrize(
    ("overrides", "reads"),
    [
        ((), True),
        (("algorithm.distill=sampled",), True),
        (("algorithm.distill=full",), False),
        (("rollout.mode=one_step_off",), False),
        ((URL,), False),
        ((URL, "algorithm.teachers.math.sources=[math]", "algorithm.teachers.code={path: code, sources: [code]}"), True),
    ],
)
def test_held_teachers_read_each_group_by_itself_where_ranks_wait_for_rollouts(overrides: tuple[str, ...], reads: bool, workdir) -> None:
    assert reads_groups(recipe(ONE, *overrides)) == reads


def test_a_role_with_a_slash_on_the_command_line() -> None:
    assert prepare_override(ROLE, [RECIPES]) == "++cluster.roles={teacher/math: {devices: 2}}"
    assert recipe(ONE, ROLE, "cluster.roles.actor.devices=3").cluster.roles["teacher/math"].devices == 2


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ((ONE,), ("actor", "rollout")),
        ((ONE, URL), ("actor", "rollout")),
        ((ONE, ROLE), ("actor", "rollout", "teacher/math")),
        ((ONE, ROLE, "rollout.external_urls=['http://h:1']"), ("actor", "teacher/math")),
        ((ONE, ROLE, "rollout.external_urls=['http://h:1']", "rollout.sglang.mem_fraction_static=0.5"), ("actor", "teacher/math")),
        ((ONE, ROLE, "run.only=rollout", "rollout.dump=true"), ("rollout", "teacher/math")),
        ((ONE, ROLE, "run.only=train", "run.replay=rollouts"), ("actor",)),
    ],
)
def test_roles(overrides: tuple[str, ...], roles: tuple[str, ...], workdir) -> None:
    """What is replayed holds what a served teacher said of it."""
    cfg = recipe(*overrides)
    check(cfg)
    assert needed_roles(cfg) == roles


REFUSED = {
    (ONE, "algorithm.teachers.math.url=h:1"): "algorithm.teachers.math.url=h:1: not http://host:port",
    (ONE, URL, "algorithm.teachers.math.key_env=NO_KEY"): "algorithm.teachers.math.key_env=NO_KEY: no environment variable has this name; "
    "export it with the server's key (the knob is its name alone)",
    (
        ONE,
        "algorithm.teachers.math.key_env=HOME",
    ): "algorithm.teachers.math.key_env=HOME has no effect without algorithm.teachers.math.url: remove it",
    (ONE, URL, ROLE): "cluster.roles.teacher/math has no effect with algorithm.teachers.math.url=http://h:1: remove one of them",
    (ONE, "cluster.roles.teacher/meth.devices=1"): "cluster.roles.teacher/meth: there is no algorithm.teachers.meth; did you mean math?",
    (ONE, "cluster.roles.teachers/math.devices=1"): "cluster.roles.teachers/math: no such role; there are actor, critic, rollout",
    (ONE, ROLE, "algorithm.teachers.math.tensor_parallel=4"): "cluster.roles.teacher/math.devices=2 does not divide by "
    "algorithm.teachers.math.tensor_parallel=4: make the devices a multiple of it",
    (
        ONE,
        "algorithm.teachers.math.tensor_parallel=2",
    ): "algorithm.teachers.math.tensor_parallel=2 has no effect on a teacher that slime does "
    "not serve: remove it, or let slime serve it on cluster.roles.teacher/math.devices",
    (
        ONE,
        URL,
        "algorithm.teachers.math.tensor_parallel=2",
    ): "algorithm.teachers.math.tensor_parallel=2 has no effect on a teacher that slime "
    "does not serve: remove it, or let slime serve it on cluster.roles.teacher/math.devices",
    (
        ONE,
        URL,
        "run.deterministic=true",
    ): "run.deterministic=true with algorithm.teachers.math.url: slime did not start that server and cannot "
    "fix its threads and batches; remove algorithm.teachers.math.url, so that the actor's ranks hold the teacher, or let slime serve it on "
    "cluster.roles",
    (ONE, ROLE, "algorithm.distill=full"): "cluster.roles.teacher/math with algorithm.distill=full: a server does not give the whole "
    "distribution of every token; choose topk or sampled, or remove cluster.roles.teacher/math so that the actor's ranks hold the teacher",
    (
        ONE,
        ROLE,
        "rollout.temperature=0.7",
    ): "cluster.roles.teacher/math with rollout.temperature=0.7: SGLang gives log-probs of given tokens "
    "at temperature 1 alone; set rollout.temperature=1, or remove cluster.roles.teacher/math so that the actor's ranks hold the teacher",
    (ONE, URL, "rollout.temperature=0.7"): "algorithm.teachers.math.url=http://h:1 with rollout.temperature=0.7: SGLang gives log-probs of "
    "given tokens at temperature 1 alone; set rollout.temperature=1, or remove algorithm.teachers.math.url so that the actor's ranks hold the "
    "teacher",
}


@pytest.mark.parametrize(("overrides", "text"), REFUSED.items())
def test_what_is_refused(overrides: tuple[str, ...], text: str, workdir) -> None:
    with pytest.raises(ConfigError) as raised:
        check(recipe(*overrides))
    assert str(raised.value) == text


def test_a_role_without_anything_to_learn_from_a_teacher(workdir) -> None:
    with pytest.raises(ConfigError, match=r"^cluster\.roles\.teacher/math: there is no algorithm\.teachers\.math$"):
        check(composed(*BASE[:2], ROLE))
