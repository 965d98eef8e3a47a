"""The multi-turn example: ids as they were drawn, tool tokens masked, one budget."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from examples.tool_calls import calculate, with_calculator
from slime.config import ModelConfig, RolloutConfig
from slime.data.template import load_tokenizer
from slime.engine.generation import Generation, Sampling
from slime.types import Sample, VersionSpan
from tests.rollout.answers import answer
from tests.tiny import make_tokenizer


@dataclass
class Scripted:
    """Answers in order, and what was asked."""

    tokenizer: object
    script: list[str]
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=100))
    asked: list[tuple[list[int], int, list[str]]] = field(default_factory=list)

    async def generate(self, sample: Sample, token_ids: list[int], max_new_tokens: int, stop: list[str]) -> Generation:
        self.asked.append((list(token_ids), max_new_tokens, stop))
        text = self.script[len(self.asked) - 1]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        return answer(ids, text.removesuffix("</call>"), version=f"r/0/{len(self.asked)}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """One that knows < and >."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, 80)
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    tokenizer.add_tokens(["<", ">"])
    return tokenizer


def run(tokenizer, script: list[str], budget: int = 100) -> tuple[Sample, Scripted]:
    client = Scripted(tokenizer, script)
    client.sampling = replace(client.sampling, max_new_tokens=budget)
    sample = Sample("2*3+1?", tokenizer("2*3+1?")["input_ids"], group=0)
    return asyncio.run(with_calculator(sample, client, RolloutConfig())), client  # type: ignore[arg-type]


def test_two_turns_with_a_result_between(tokenizer):
    sample, client = run(tokenizer, ["<call>2*3</call>", "so 7"])
    sample.check()
    whole = tokenizer.decode(sample.response_ids)
    assert whole == sample.text == "<call>2*3</call><result>6</result>so 7"
    drawn = [i for i, m in zip(sample.response_ids, sample.loss_mask, strict=True) if m]
    assert tokenizer.decode(drawn) == "<call>2*3</call>so 7"
    assert all(p == 0.0 for p, m in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if not m)
    first, second = client.asked
    assert second[0] == [*sample.prompt_ids, *sample.response_ids[: len("<call>2*3</call><result>6</result>")]]
    assert (first[1], second[1]) == (100, 100 - len("<call>2*3</call><result>6</result>"))
    assert first[2] == ["</call>"]


def test_versions_lie_where_their_tokens_do(tokenizer):
    sample, _ = run(tokenizer, ["<call>2*3</call>", "so 7"])
    call, whole = len("<call>2*3</call>"), len(sample.response_ids)
    assert sample.weight_versions == [VersionSpan("r/0/1", 0, call), VersionSpan("r/0/2", whole - 4, whole)]


def test_a_result_beyond_the_budget_truncates(tokenizer):
    sample, client = run(tokenizer, ["<call>2*3</call>", "never"], budget=20)
    assert sample.truncated and len(client.asked) == 1 and len(sample.response_ids) <= 20


def test_the_number_of_turns_is_bounded(tokenizer):
    _, client = run(tokenizer, ["<call>1</call>"] * 10, budget=1000)
    assert len(client.asked) == 4


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(7-2)", "60"),
        ("1/4", "0.25"),
        ("-3+1", "-2"),
        ("1/0", "error: "),
        ("9**9**9", "error: "),
        ("open('x')", "error: "),
        ("2*", "error: "),
    ],
)
def test_calculate(expression: str, value: str):
    assert calculate(expression).startswith(value)
