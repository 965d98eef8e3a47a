"""Teachers that a recipe names: each refusal has one cause, and the recipes beside them pass."""

import pytest

from slime.config.check_teachers import check_teachers
from slime.config.exits import ConfigError
from tests.config.composing import composed

GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]", "algorithm.name=opd", "algorithm.distill=topk"]
ONE = "algorithm.teachers={math: {path: teacher}}"
SERVED = "algorithm.teachers={math: {path: teacher, url: http://h:1}}"
TWO = "algorithm.teachers={math: {path: a, sources: [gsm, aime]}, code: {path: b, sources: [mbpp]}}"

REFUSED = {
    "has no effect with algorithm.distill=none": ["algorithm.name=grpo", "algorithm.distill=none", ONE],
    "algorithm.distill=topk without a teacher: set algorithm.teachers.<name>.path": [],
    "algorithm.teachers.code.sources is empty beside other teachers": [
        "algorithm.teachers={math: {path: a, sources: [gsm]}, code: {path: b}}"
    ],
    "math and code teach source gsm; give it to one of them": [
        "algorithm.teachers={math: {path: a, sources: [gsm]}, code: {path: b, sources: [gsm]}}"
    ],
    "algorithm.teachers.Math: a teacher's name is of": ["algorithm.teachers={Math: {path: a}}"],
    "algorithm.teachers.math.key_env=KEY has no effect without algorithm.teachers.math.url: remove it": [
        "algorithm.teachers={math: {path: a, key_env: KEY}}"
    ],
    "with algorithm.distill=full: a server does not give the whole distribution": [SERVED, "algorithm.distill=full"],
    "with rollout.temperature=0.7: SGLang gives log-probs of given tokens at temperature 1 alone": [SERVED, "rollout.temperature=0.7"],
    "algorithm.distill=full with trainer.pipeline_parallel=2": [ONE, "algorithm.distill=full", "trainer.pipeline_parallel=2"],
}
PASS = [
    [ONE],
    [TWO],
    [SERVED, "algorithm.distill=sampled"],
    [ONE, "algorithm.distill=full", "rollout.temperature=0.7"],
    [ONE, "trainer.pipeline_parallel=2"],
    ["algorithm.name=grpo", "algorithm.distill=sampled", TWO],
    ["algorithm.name=grpo", "algorithm.distill=none"],
]


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_says_why(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_teachers(composed(*GOOD, *REFUSED[text]))
    assert text in str(error.value)


@pytest.mark.parametrize("overrides", PASS, ids=str)
def test_what_goes_together_passes(overrides: list[str]) -> None:
    check_teachers(composed(*GOOD, *overrides))
