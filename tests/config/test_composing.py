"""Recipes that tests compose in the short way are those that Hydra composes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from slime.config import SlimeConfig
from slime.config.exits import ConfigError
from slime.config.load import compose
from tests.config import test_bad_recipes, test_check_teachers, test_served_teachers
from tests.config.composing import composed
from tests.config.test_bad_recipes import BAD_COMBINATIONS, BAD_FILES, BAD_KEYS, BAD_PARALLEL, BAD_TYPES, BAD_VALUES, GOOD, INERT, split

ALONE = [[override] for override in BAD_KEYS | BAD_TYPES | BAD_VALUES | BAD_FILES]
TOGETHER = [split(overrides) for overrides in [*(INERT | BAD_COMBINATIONS | BAD_PARALLEL), *test_bad_recipes.PASS]]
OF_TEACHERS = [*test_check_teachers.REFUSED.values(), *test_check_teachers.PASS, *map(list, test_served_teachers.REFUSED)]
# What each step of composing raises first, and each kind of value; the rest is left to `make test-slow`.
FEW = [
    ["lr=3"],
    ["~data.eval.h"],
    ["run.steps=null"],
    ["data.train=[{pth: x}]"],
    ["run.seed=${run.stepz}"],
    ["data.train.0.path=~/q.jsonl", "data.eval={h: {path: p.jsonl, temperature: inf}}", "data.eval.h.samples=4"],
    ["cluster.roles.actor.devices=8", "cluster.roles.teacher/math.devices=2", "trainer.megatron.x=true", "algorithm.name=ppo"],
]


def outcome(make: Callable[[list[str]], SlimeConfig], overrides: list[str]) -> str:
    """Written out: NaN is not equal to itself."""
    try:
        return repr(make([*GOOD, *overrides]))
    except ConfigError as error:
        return f"refused: {error}"


def short_and_long(overrides: list[str]) -> tuple[str, str]:
    return outcome(lambda given: composed(*given), overrides), outcome(lambda given: compose(overrides=given).cfg, overrides)


@pytest.mark.thorough
@pytest.mark.parametrize("overrides", FEW, ids=" ".join)
def test_the_short_way_gives_what_hydra_gives(overrides: list[str], workdir: Path) -> None:
    short, long = short_and_long(overrides)
    assert short == long


@pytest.mark.slow
def test_the_short_way_gives_what_hydra_gives_in_every_test(workdir: Path) -> None:
    differing = []
    for overrides in [*ALONE, *TOGETHER, *OF_TEACHERS]:
        short, long = short_and_long(overrides)
        if short != long:
            differing.append((overrides, short, long))
    assert differing == []
