"""A generate function of several turns: the model may call a calculator, reads the result, and goes on.

    slime train ... rollout.generate=examples.tool_calls:with_calculator

The model writes <call>12*7</call>, the result comes back as <result>84</result>. Token ids that were generated are never made from text
again: each turn continues exactly the ids of the turns before, and the result's tokens are masked from the loss.
"""

import ast
import operator
import re

from slime.config import RolloutConfig
from slime.rollout.client import RolloutClient
from slime.rollout.generate import append_answer, append_observation
from slime.types import Sample

MAX_TURNS = 4
END = "</call>"
CALL = re.compile(r"<call>([^<]*)</call>\s*$")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


async def with_calculator(sample: Sample, client: RolloutClient, cfg: RolloutConfig) -> Sample:
    """One trajectory of at most MAX_TURNS turns within the token budget of one answer, results included."""
    budget = client.sampling.max_new_tokens
    for _ in range(MAX_TURNS):
        ids = [*sample.prompt_ids, *sample.response_ids]
        answer = await client.generate(sample, ids, budget - len(sample.response_ids), stop=[*cfg.stop, END])
        append_answer(sample, answer)
        call = CALL.search(str(client.tokenizer.decode(answer.output_ids)))
        if call is None:
            break
        result = f"<result>{calculate(call[1])}</result>"
        result_ids = client.tokenizer(result, add_special_tokens=False)["input_ids"]
        if len(sample.response_ids) + len(result_ids) >= budget:
            sample.finish_reason = "length"
            break
        append_observation(sample, result_ids, END + result)  # an engine leaves the stop string out of its text
    return sample


def calculate(expression: str) -> str:
    """The value of + - * / over numbers; anything else is told to the model as an error."""
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):g}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError) as error:
        return f"error: {error}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only + - * / of numbers")
