"""docs/algorithms.md against the code: names, knobs with defaults and readers, recipes, papers, metrics, figures, the worked example."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import learning
from slime.algorithms import cispo, gspo
from slime.algorithms.registry import build_algorithm
from slime.algorithms.terms import clip_of
from slime.config import AlgorithmConfig
from slime.config.algorithms import ALGORITHMS
from slime.config.check_algorithm import check_algorithm
from slime.config.load import compose
from slime.config.recipes import RECIPES
from slime.config.tree import knobs
from tests.algorithms.local import make_inputs
from tests.algorithms.test_terms import make_step
from tests.observe import test_documented_metrics as metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/algorithms.md").read_text()
TEXT = re.sub(r"```.*?```", "", PAGE.split("## What went wrong elsewhere")[0], flags=re.DOTALL)
KNOBS = {knob.path: knob for knob in knobs()}
OF_EXAMPLE = "2401.16025"  # the paper of the worked example, which is in no code of ours
SPO = "my_pkg.spo:build"


def table(head: str) -> list[list[str]]:
    """The cells of the rows below the head that begins so."""
    begin = PAGE.index(f"\n| {head}") + 1
    lines = PAGE[begin:].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.thorough
def test_every_algorithm_and_every_recipe_has_its_place() -> None:
    rows = table("`algorithm.name` |")
    assert [quoted(row[0])[0] for row in rows] == list(ALGORITHMS)
    listed = {recipe: quoted(row[0])[0] for row in rows for recipe in quoted(row[4])}
    assert listed.keys() == {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("base", "quickstart"))}
    for recipe, name in listed.items():
        assert compose(recipe, [], None).cfg.algorithm.name == name, recipe


def test_defaults_and_readers_of_every_knob() -> None:
    listed = []
    for names, default, readers in table("`algorithm.` |"):
        listed += quoted(names)
        said = readers.removeprefix("all but ").split(", ")
        expected = set(ALGORITHMS) if readers == "all" else set(ALGORITHMS) - set(said) if readers != ", ".join(said) else set(said)
        for name in quoted(names):
            assert {algorithm for algorithm, traits in ALGORITHMS.items() if name in traits.reads} == expected, name
        if quoted(names)[0] not in ("clip_low", "clip_high"):
            assert quoted(default) == [written(getattr(AlgorithmConfig(), name)) for name in quoted(names)], names
    assert sorted(listed) == sorted(set(AlgorithmConfig.__dataclass_fields__) - {"name"})


def test_default_bounds_of_the_clip() -> None:
    low, high = (next(row[1] for row in table("`algorithm.` |") if row[0] == f"`{name}`") for name in ("clip_low", "clip_high"))
    assert low == f"{clip_of(AlgorithmConfig()).low:g}; gspo {gspo.CLIP_LOW:g}; cispo {cispo.CLIP_LOW:g}"
    assert high == f"`clip_low`; gspo {gspo.CLIP_HIGH:g}; cispo {cispo.CLIP_HIGH:g}"
    assert clip_of(AlgorithmConfig(clip_low=0.1)).high == 0.1


def test_knobs_on_the_page_exist_and_take_the_values_that_it_names() -> None:
    leaves = {path.rsplit(".", 1)[-1] for path in KNOBS}
    groups = "run|data|rollout|trainer|algorithm|critic|reward|sync|cluster|observe"
    named = {name for text in quoted(TEXT) for name in re.findall(rf"(?<![\w.])((?:{groups})\.[a-z_]+)", text)}
    assert len(named) > 15 and {n for n in named if n not in KNOBS and n not in ("cluster.roles", "rollout.filters")} == set()
    settings = [pair for text in quoted(TEXT) for pair in re.findall(r"^([a-z_.]+)=([a-z0-9_.]+)$", text)]
    assert len(settings) > 20
    for name, value in settings:
        assert name.rsplit(".", 1)[-1] in leaves, name
        choices = next((k.metadata.get("choices") for path, k in KNOBS.items() if f".{path}".endswith(f".{name}")), None)
        assert not choices or value in choices, f"{name}={value}"


def test_metrics_on_the_page_are_recorded() -> None:
    named = {text for text in quoted(TEXT) if re.fullmatch(rf"({'|'.join(metrics.GROUPS)})/\w+", text)}
    assert len(named) > 15 and named - metrics.documented() == set()


def test_papers_are_those_that_the_code_names() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "slime").rglob("*.py"))
    ids = set(re.findall(r"\d{4}\.\d{5}", PAGE))
    assert len(ids) > 12 and {number for number in ids - {OF_EXAMPLE} if number not in code} == set()
    links = re.findall(r"\[([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\)", PAGE)
    assert links and all(text == target for text, target in links)


def test_links_lead_somewhere() -> None:
    def anchors(text: str) -> set[str]:
        return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}

    links = re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", PAGE)
    assert len(links) > 8
    for path, anchor in links:
        target = ROOT / "docs" / path if path else ROOT / "docs/algorithms.md"
        assert target.exists() and (not anchor or anchor in anchors(target.read_text())), (path, anchor)


def test_figures_of_the_vocabulary_are_those_that_were_measured() -> None:
    gpu, cpu = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("vocabulary_gpu", "vocabulary"))
    rows = table("| memory on an H200")
    assert gpu["device"] == "NVIDIA H200" and cpu["device"] == "cpu, 2 threads"
    assert {run["tokens"] for run in gpu["runs"]} == {8192} and {run["tokens"] for run in cpu["runs"]} == {2048}
    assert {run["vocabulary"] for run in gpu["runs"] + cpu["runs"]} == {151936} and gpu["chunk_elements"] == cpu["chunk_elements"] == 2**24
    pairs = list(zip(gpu["runs"][::2], gpu["runs"][1::2], cpu["runs"][::2], cpu["runs"][1::2], strict=True))
    for cells, (ours, obvious, ours_cpu, obvious_cpu) in zip(rows, pairs, strict=True):
        assert cells[0] == ours["case"] == obvious_cpu["case"] and (ours["way"], obvious_cpu["way"]) == ("ours", "obvious")
        assert cells[1] == f"{ours['peak_bytes'] / 1e9:.2f} GB, not {obvious['peak_bytes'] / 1e9:.2f}"
        assert cells[2] == f"{ours['seconds']:.3f}, not {obvious['seconds']:.3f}"
        assert cells[3] == f"{ours_cpu['peak_bytes'] / 1e9:.2f} GB, not {obvious_cpu['peak_bytes'] / 1e9:.2f}"
        assert cells[4] == f"{ours_cpu['cpu_seconds']:.1f}, not {obvious_cpu['cpu_seconds']:.1f}"
    slower = [ours["seconds"] / obvious["seconds"] for ours, obvious, *_ in pairs]
    assert f"takes {min(slower):.1f} to {max(slower):.1f} times as long" in re.sub(r"\s+", " ", PAGE)


def test_the_place_for_what_was_learned_is_there() -> None:
    assert PAGE.count(learning.BEGIN) == PAGE.count(learning.END) == 1
    assert "## Does it learn?" in PAGE.partition(learning.BEGIN)[0] and learning.END in PAGE.partition(learning.BEGIN)[2]


def test_the_recipe_of_teachers_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nmodel: {path: m}\ndata: {train: [{path: t.jsonl}]}\n" + block("yaml"))
    cfg = compose("mine", ["algorithm.name=opd", "algorithm.distill=topk", "cluster.roles.teacher/code.devices=4"], tmp_path).cfg
    assert [teacher.sources for teacher in cfg.algorithm.teachers.values()] == [["gsm8k", "aime"], ["code"]]


@pytest.mark.parametrize("bound", [None, 0.1])
def test_the_worked_example_is_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float | None) -> None:
    """Advantages are GRPO's, the gradient turns where r = 1 + sign(A) clip_low, as the paper has it, and the common terms are added."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "spo.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    cfg = AlgorithmConfig(SPO, clip_low=bound, entropy_coef=0.1)
    check_algorithm(cfg)
    try:
        spo = build_algorithm(cfg)
    finally:
        for name in ("my_pkg.spo", "my_pkg"):
            sys.modules.pop(name, None)
    step = make_step()
    assert (spo.targets(step).advantages == build_algorithm(AlgorithmConfig("grpo")).targets(step).advantages).all()
    eps, inputs = bound or 0.2, make_inputs(60)
    log_ratio = torch.log(1 + eps * inputs.advantages.sign() * torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64).repeat(20))
    inputs = replace(inputs, logprobs=(inputs.old_logprobs + log_ratio).detach().requires_grad_())
    outputs = spo.loss(inputs)
    (slope,) = torch.autograd.grad(outputs.loss.sum(), inputs.logprobs, retain_graph=True)
    before, at, beyond = (-slope * inputs.advantages.sign()).reshape(20, 3).T
    assert (before > 0).all() and (at.abs() < 1e-12).all() and (beyond < 0).all()
    (of_entropy,) = torch.autograd.grad(outputs.loss.sum(), inputs.entropy)
    assert torch.allclose(of_entropy, torch.full_like(of_entropy, -0.1))
    assert {"far_frac", "pg_loss", "entropy", "kl"} == outputs.metrics.keys()
    assert outputs.metrics["far_frac"].reshape(20, 3)[:, 2].all() and not outputs.metrics["far_frac"].reshape(20, 3)[:, 0].any()
