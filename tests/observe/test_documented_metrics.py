"""docs/running.md and README.md against the code: every metric that the code records is on the page, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from slime.config.exits import MEANING
from slime.config.load import compose
from slime.types import Sample

ROOT = Path(__file__).parents[2]
PAGE, README = (ROOT / "docs/running.md").read_text(), (ROOT / "README.md").read_text()
ALONE = (ROOT / "slime/run.py", ROOT / "slime/observe/mismatch.py")
SOURCES = [*ALONE, *(p for room in ("cluster", "data", "rollout", "sync", "trainer") for p in (ROOT / "slime" / room).rglob("*.py"))]
GROUPS = (
    *("reward", "group", "response_len", "advantage", "train", "mismatch", "offpolicy", "staleness"),
    *("distill", "engine", "rollout", "sync", "time", "perf", "ledger", "eval", "value", "critic"),
)
OPEN = ("rollout.sglang.", "trainer.megatron.", "cluster.roles.", "algorithm.teachers", "rollout.filters")  # names of their own below
METRIC = re.compile(rf"({'|'.join(GROUPS)})(/[\w{{}}]+)+")


def keys(tree: ast.AST) -> Iterator[str]:
    """Every string that is a key of a dict display or comprehension, or an index; what an f-string fills in is written {}."""
    for node in ast.walk(tree):
        of_node = node.keys if isinstance(node, ast.Dict) else [node.key] if isinstance(node, ast.DictComp) else []
        for key in [*of_node, *([node.slice] if isinstance(node, ast.Subscript) else [])]:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value
            elif isinstance(key, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in key.values)


def metrics_of_losses(tree: ast.Module) -> Iterator[str]:
    """Keys in the functions that return LossOutputs."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "LossOutputs":
            yield from keys(node)


@cache
def recorded() -> set[str]:
    """Names of all metrics that the code writes."""
    found = {k for path in SOURCES for k in keys(ast.parse(path.read_text())) if METRIC.fullmatch(k)}
    assert "eval/{}/{}" in found and "train/{}" in found
    evaluation = ast.parse((ROOT / "slime/rollout/evaluate.py").read_text())
    of_a_set = {k for k in keys(evaluation) if k.isidentifier()} | {k for k in found if k.startswith("response_len/")}
    of_a_loss = {k for path in sorted((ROOT / "slime/algorithms").glob("*.py")) for k in metrics_of_losses(ast.parse(path.read_text()))}
    return found - {"eval/{}/{}"} | {f"eval/{{}}/{k}" for k in of_a_set} | {f"train/{k}" for k in of_a_loss}


def documented() -> set[str]:
    """The names in the first column of the table of metrics, with {} for <name>."""
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.split("## Metrics")[1].split("\n## ")[0], re.MULTILINE)
    return {re.sub(r"<\w+>", "{}", name) for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_collector_finds_the_metrics_of_a_run() -> None:
    """As in metrics.jsonl of the quickstart and its warm start."""
    names = "train/pg_loss train/nll train/loss train/lr reward/mean time/idle_frac time/sync_s ledger/pending sync/wire_bytes perf/mfu"
    names += " train/kl train/ref_kl train/clip_frac distill/reverse_kl distill/{}/reverse_kl"
    names += " mismatch/kl offpolicy/ess staleness/max advantage/std engine/running eval/{}/pass_at_k eval/{}/response_len/mean"
    assert set(names.split()) <= recorded()


def test_every_metric_is_documented() -> None:
    assert recorded() - documented() == set()


def test_every_documented_metric_exists() -> None:
    assert documented() - recorded() == set()


def test_documented_fields_of_a_sample_exist() -> None:
    table = PAGE.split("`slime.types.Sample`:")[1].split("\n\n")[1]
    names = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()))
    blank = Sample(prompt="p", prompt_ids=[1], group=0)
    assert len(names) > 10 and [n for n in names if not hasattr(blank, n)] == []


def test_exit_codes_are_documented() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)} == MEANING.keys()


@pytest.mark.parametrize("text", [README, PAGE], ids=["README", "running"])
def test_recipes_on_the_pages_are_recipes(text: str, tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    begins = "" if "defaults:" in shown else "defaults: [base, _self_]\nmodel: {path: m}\n"
    (tmp_path / "mine.yaml").write_text(begins + shown)
    cfg = compose("mine", [], tmp_path).cfg
    assert cfg.model.path and all(s.path.endswith(("jsonl", "parquet")) for s in cfg.data.eval.values()) and cfg.data.eval


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_knobs_on_the_pages_exist(page: str) -> None:
    known = set(re.findall(r"`([\w.<>]+)`", (ROOT / "docs/knobs.md").read_text()))
    named = re.findall(
        r"(?<![\w.])((?:run|rollout|reward|trainer|observe|algorithm|sync|cluster)\.[a-z_]+(?:\.[a-z_]+)*)", (ROOT / page).read_text()
    )
    unknown = {k for k in named if k not in known and not k.startswith(OPEN)}
    assert unknown == set()
