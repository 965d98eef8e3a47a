"""Texts in a report: the same evaluation prompts before and after, and samples of the first, a middle and the last step."""

from collections.abc import Sequence
from html import escape

from slime.observe.charts import number
from slime.observe.report_examples import Example

A_STEP, PAIRS = 4, 6  # texts shown of a step, and pairs before and after
LONGEST = 2400  # characters of one text
SCROLL = 'style="max-height: 18em; overflow: auto"'  # of a text in the table


def before_after_table(examples: Sequence[Example]) -> str:
    """Evaluation prompts that were answered at two different steps: the first answer beside the last. "" where there are none."""
    by_prompt: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        if example.of_evaluation:
            by_prompt.setdefault((example.source, example.prompt), []).append(example)
    pairs = [(e[0], e[-1]) for e in by_prompt.values() if e[0].step != e[-1].step]
    if not pairs:
        return ""
    steps = sorted({pairs[0][0].step, pairs[0][1].step})
    rows = "".join(
        f'<tr><td><pre class="text" {SCROLL}>{text(first.prompt)}</pre></td>'
        f'<td class="label"><pre class="text" {SCROLL}>{text(first.label)}</pre></td>'
        f"<td>{_answer(first)}</td><td>{_answer(last)}</td></tr>"
        for first, last in _spread(pairs, PAIRS)
    )
    answers = "".join(f'<th style="width: 36%">after {step} updates</th>' for step in steps)
    head = f"<tr><th>prompt</th><th>label</th>{answers}</tr>"
    return f'<h2>Evaluation prompts, before and after</h2><div class="card scroll"><table>{head}{rows}</table></div>'


def samples(examples: Sequence[Example], *, judged: bool = True) -> str:
    """Training samples, a column a step. "" where there are none. Where they are not `judged`, a missing reward is not told."""
    by_step: dict[int, list[Example]] = {}
    for example in examples:
        if not example.of_evaluation:
            by_step.setdefault(example.step, []).append(example)
    if not by_step:
        return ""
    columns = "".join(
        f'<div class="card"><p class="step">Update {step}</p>{"".join(_sample(e, judged) for e in shown[:A_STEP])}</div>'
        for step, shown in sorted(by_step.items())
    )
    return f'<h2>Samples</h2><div class="columns">{columns}</div>'


def text(value: str) -> str:
    """Escaped, and cut in the middle where it is long."""
    left_out = len(value) - LONGEST
    if left_out <= 0:
        return escape(value)
    half = LONGEST // 2
    return f'{escape(value[:half])}<span class="note">… {left_out:,} characters left out …</span>{escape(value[-half:])}'


def _sample(example: Example, judged: bool) -> str:
    """A demonstration's response is its label: that is not said twice."""
    reward = _reward(example) if judged else ""
    label = f"<span>label {text(example.label)}</span>" if example.label and judged else ""
    source = f"<span>{escape(example.source)}</span>" if example.source else ""
    return (
        f'<div class="sample"><div class="meta">{reward}{label}{source}</div>'
        f'<pre class="text prompt">{text(example.prompt)}</pre><pre class="text response">{text(example.response)}</pre></div>'
    )


def _answer(example: Example) -> str:
    return f'<div class="answer"><pre class="text" {SCROLL}>{text(example.response)}</pre>{_reward(example)}</div>'


def _reward(example: Example) -> str:
    if example.reward is None:
        return '<span class="pill warn">no reward</span>'
    kind = "good" if example.reward > 0 else "bad" if example.reward < 0 else ""
    return f'<span class="pill {kind}">reward {number(example.reward)}</span>'


def _spread(items: list, count: int) -> list:
    """At most `count` items, evenly spread."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
