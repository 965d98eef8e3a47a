import random

import pytest

from slime.config.exits import GateStopped
from slime.rollout.draw import MENDS, Draw


def test_draws_only_what_is_wanted_and_refills_what_is_dropped():
    draw = Draw(first=40, wanted=2)
    assert [draw.take(), draw.take(), draw.take()] == [40, 41, None]
    draw.drop(41, "filter")
    assert [draw.take(), draw.take()] == [42, None]
    draw.keep(42)
    draw.keep(40)
    assert draw.complete and draw.take() is None
    assert (draw.drawn, draw.kept, draw.dropped) == (3, {40, 42}, {41: "filter"})


@pytest.mark.parametrize("seed", range(20))
def test_the_batch_does_not_depend_on_which_group_finishes_first(seed: int):
    rng = random.Random(seed)
    bad = {o for o in range(100) if o % 3 == 1}
    draw, under_way = Draw(0, 10), []
    while not draw.complete:
        while (ordinal := draw.take()) is not None:
            under_way.append(ordinal)
        ordinal = under_way.pop(rng.randrange(len(under_way)))
        draw.drop(ordinal, "filter") if ordinal in bad else draw.keep(ordinal)
    assert sorted(draw.kept) == [o for o in range(100) if o not in bad][:10]
    assert not draw.under_way and draw.drawn == 15


def test_surplus_is_dropped_by_name():
    draw = Draw(0, 2, surplus=1)
    assert [draw.take() for _ in range(4)] == [0, 1, 2, None]
    draw.keep(2)
    draw.keep(0)
    draw.drop_surplus()
    assert draw.complete and draw.dropped == {1: "surplus"}


def test_gives_up_where_nearly_everything_is_dropped():
    draw = Draw(0, 2)
    says = (
        r"63 of 64 prompts were dropped \(filter 60, too_long 3\) and 1 of 2 kept, .*; "
        r"loosen rollout\.filter, raise data\.max_prompt_tokens"
    )
    with pytest.raises(GateStopped, match=says):  # a gate, whatever the step: it is no wrong recipe
        while (ordinal := draw.take()) is not None:
            draw.keep(ordinal) if ordinal == 7 else draw.drop(ordinal, "too_long" if ordinal < 3 else "filter")


@pytest.mark.parametrize("reason", ["filter", "too_long", "reward_error"])
def test_what_to_turn_is_what_dropped(reason: str):
    draw = Draw(0, 1)
    with pytest.raises(GateStopped) as stopped:
        while (ordinal := draw.take()) is not None:
            draw.drop(ordinal, reason)
    assert [r for r, mend in MENDS.items() if mend in str(stopped.value)] == [reason]
