import random

import pytest

from slime.rollout.draw import Draw


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
    with pytest.raises(ValueError, match=r"64 of 64 prompts were dropped \(filter\) and 0 of 2 kept; loosen rollout\.filter"):
        while (ordinal := draw.take()) is not None:
            draw.drop(ordinal, "filter")
