"""What a resumed run may change: every knob has a kind."""

from dataclasses import asdict, fields

import pytest

from slime.config import SlimeConfig
from slime.config.changes import COURSE, FREE, FREE_OPTIONS, PROMPTS, Change, Kind, changes, kind_of
from slime.config.tree import is_open, type_of


def test_every_knob_has_one_kind_and_every_kind_names_knobs() -> None:
    known = [f"{group.name}.{knob.name}" for group in fields(SlimeConfig) for knob in fields(type_of(group.name))]
    sorted_out = [f"{group}.{knob}" for kind in (FREE, PROMPTS, COURSE) for group, knobs in kind.items() for knob in knobs]
    assert sorted(sorted_out) == sorted(known), "put a new knob into FREE, PROMPTS or COURSE of slime/config/changes.py"
    assert all(is_open(type_of(knob)) for knob in FREE_OPTIONS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run.seed", Kind.PROMPTS),
        ("trainer.lr", Kind.COURSE),
        ("algorithm.importance_reject.token", Kind.COURSE),
        ("cluster.roles.actor.devices", Kind.FREE),
        ("rollout.sglang.mem_fraction_static", Kind.FREE),
        ("rollout.sglang.attention_backend", Kind.COURSE),
        ("trainer.megatron.recompute_method", Kind.FREE),
        ("run.steps", Kind.FREE),
        ("algorithm.teachers.math.url", Kind.FREE),
        ("algorithm.teachers.math.path", Kind.COURSE),
        ("rollout.a_knob_of_yesterday", Kind.FREE),
    ],
)
def test_kinds(name: str, kind: Kind) -> None:
    assert kind_of(name, asdict(SlimeConfig())) is kind


@pytest.mark.parametrize(
    ("schedule", "decay_steps", "kind"), [("cosine", None, Kind.COURSE), ("cosine", 9, Kind.FREE), ("wsd", 9, Kind.COURSE)]
)
def test_more_steps_are_free_where_the_learning_rate_does_not_know_them(schedule: str, decay_steps: int | None, kind: Kind) -> None:
    recipe = asdict(SlimeConfig())
    recipe["trainer"] |= {"schedule": schedule, "decay_steps": decay_steps}
    assert kind_of("run.steps", recipe) is kind


def test_a_knob_that_an_older_slime_did_not_know_is_at_its_default() -> None:
    before, now = asdict(SlimeConfig()), asdict(SlimeConfig())
    del before["trainer"]["eps"]
    before["trainer"]["old"] = 3
    assert changes(before, now) == [Change("trainer.old", 3, None, Kind.FREE)]
    now["trainer"]["eps"] = 0.1
    assert Change("trainer.eps", None, 0.1, Kind.COURSE) in changes(before, now)


def test_names_accept_themselves_and_what_is_below_a_knob() -> None:
    change = Change("rollout.sglang.a.b", 1, 2, Kind.COURSE)
    assert [change.accepted([name]) for name in ("rollout.sglang", "rollout.sglang.a", "rollout.sglang.a.b")] == [True] * 3
    assert [change.accepted([name]) for name in ("rollout", "rollout.sg", "rollout.sglang.a.b.c")] == [False] * 3
