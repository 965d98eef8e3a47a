import pytest

from slime.trainer.options import KINDS, OWNED, sort_options


def test_options_go_to_the_dataclass_that_has_them():
    options = sort_options({"recompute_granularity": "full", "overlap_grad_reduce": True, "log_num_zeros_in_grad": True})
    assert options.model == {"recompute_granularity": "full"}
    assert options.ddp == {"overlap_grad_reduce": True}
    assert options.optimizer == {"log_num_zeros_in_grad": True}


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"did you mean trainer\.megatron\.recompute_granularity"):
        sort_options({"recompute_granularty": "full"})


def test_what_slime_decides_is_refused_with_its_knob():
    with pytest.raises(ValueError, match=r"use trainer\.lr"):
        sort_options({"lr": 1.0})


def test_owned_names_exist():
    known = {name for cls in KINDS.values() for name in cls.__dataclass_fields__}
    assert known >= OWNED.keys()
