import pytest

from slime.algorithms.base import Algorithm
from slime.algorithms.registry import build_algorithm
from slime.algorithms.sft import advantages, loss
from slime.config import AlgorithmConfig


def mine(cfg: AlgorithmConfig) -> Algorithm:
    return Algorithm(advantages=advantages, loss=loss, uses_old_logprobs=cfg.entropy_coef > 0)


def not_an_algorithm(cfg: AlgorithmConfig) -> str:
    return "grpo"


HERE = __name__


def test_builtins_and_import_paths():
    assert build_algorithm(AlgorithmConfig(name="grpo")).needs_rollouts
    assert not build_algorithm(AlgorithmConfig(name="sft")).needs_rollouts
    assert build_algorithm(AlgorithmConfig(name=f"{HERE}:mine", entropy_coef=1.0)).uses_old_logprobs
    assert not build_algorithm(AlgorithmConfig(name=f"{HERE}:mine")).uses_old_logprobs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", r"algorithm\.name=grop: no such algorithm; did you mean grpo\?"),
        ("zebra", r"algorithm\.name=zebra: no such algorithm; choose grpo, sft or pkg\.mod:fn"),
        ("no_such_package.mod:fn", r"algorithm\.name=.*no_such_package"),
        (f"{HERE}:mime", r"algorithm\.name=.*did you mean mine"),
        (f"{HERE}:not_an_algorithm", r"algorithm\.name=.* returned str; it must return slime\.algorithms\.base\.Algorithm"),
    ],
)
def test_a_wrong_name_says_what_to_change(name, message):
    with pytest.raises(ValueError, match=message):
        build_algorithm(AlgorithmConfig(name=name))
