from itertools import pairwise

import pytest

from slime.config import TrainerConfig
from slime.config.trainer import decay_length
from slime.trainer.schedule import learning_rate


def rates(steps, **values):
    return [learning_rate(TrainerConfig(lr=1.0, **values), k, steps) for k in range(steps)]


def test_constant_after_linear_warm_up():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(3) == [1.0, 1.0, 1.0]


def test_cosine_falls_to_min_lr():
    lr = rates(12, schedule="cosine", warmup_steps=2, min_lr=0.1)
    assert lr[:3] == [0.5, 1.0, 1.0] and lr[7] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(lr[2:])) and lr[-1] > 0.1
    assert rates(12, schedule="cosine", decay_steps=4, min_lr=0.1)[4:] == pytest.approx([0.1] * 8)


def test_wsd_is_flat_and_then_falls():
    assert rates(8, schedule="wsd", decay_steps=4, warmup_steps=1) == [1, 1, 1, 1, 1.0, 0.75, 0.5, 0.25]
    tenth = rates(30, schedule="wsd")
    assert tenth[:28] == [1.0] * 28 and tenth[28:] == pytest.approx([2 / 3, 1 / 3])


def test_a_short_run_decays_too():
    """A tenth of it would be a single step, which is at the peak still."""
    assert rates(5, schedule="wsd") == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert rates(5, schedule="wsd", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0], "nothing is left to decay"


@pytest.mark.parametrize("warmup_steps", [0, 90])
def test_the_default_decay_of_wsd_follows_the_warm_up_without_a_jump(warmup_steps):
    lr = [0.0, *rates(100, schedule="wsd", warmup_steps=warmup_steps)]
    assert max(abs(a - b) for a, b in pairwise(lr[1 if warmup_steps == 0 else 0 :])) < 0.11
    assert decay_length(TrainerConfig(schedule="wsd"), 100) == 10 and decay_length(TrainerConfig(schedule="wsd"), 5) == 2
    assert decay_length(TrainerConfig(schedule="cosine", warmup_steps=5), 100) == 95


def test_unknown_schedule_names_the_knob():
    with pytest.raises(ValueError, match=r"trainer\.schedule='linear'"):
        rates(1, schedule="linear")
