"""What the benchmark of learning makes of its runs: rows, tokens until the teacher's accuracy, the page, the exit code."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import learning
from benchmarks.learning import BEGIN, END, MARGINS, SEEDS, Learned, compared, rows, write

PAGE = f"before\n\n{BEGIN}\nNot run yet.\n{END}\n\nafter\n"


def made(recipe: str, seed: int = 0, after: float = 0.9) -> Learned:
    """Two updates of 100 tokens, and 75 % after the first."""
    curve = {"heldout": [0.75, after]}
    return Learned(recipe, seed, "abc", 60.0 + seed, {"heldout": 0.4}, {"heldout": after}, [100, 200], curve)


def test_a_rise_is_that_of_the_set_that_rose_least() -> None:
    learned = made("grpo")
    learned.before["turned"], learned.after["turned"] = 0.5, 0.75
    assert learned.rise == pytest.approx(25)


def test_tokens_are_counted_until_every_set_is_there() -> None:
    learned = made("grpo")
    assert [learned.tokens_to(accuracy) for accuracy in (0.7, 0.75, 0.8, 0.9, 0.91)] == [100, 100, 200, 200, None]
    learned.curves["turned"] = [0.5, 0.85]
    assert [learned.tokens_to(accuracy) for accuracy in (0.7, 0.9)] == [200, None]


def test_a_row_has_every_seed_and_the_worst_of_them() -> None:
    first, second = made("ppo"), made("ppo", seed=1, after=0.8)
    second.before["turned"], second.after["turned"] = 0.3, 0.55
    assert rows([first, made("sft"), second]) == [
        ["ppo", "2", "40.0 30.0", "90.0 55.0", "+25.0", "+30", "60"],
        ["sft", "2", "40.0", "90.0", "+50.0", "+30", "60"],
    ]


def test_recipes_are_compared_by_their_own_seeds_teacher() -> None:
    found = [made("grpo"), made("grpo", seed=1), made("opd_full"), made("rloo")]
    assert compared(found, {0: 0.78, 1: 1.0}) == {"opd_full": [100], "grpo": [100, None]}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "learning.json")
    monkeypatch.setattr(learning, "PAGE", tmp_path / "algorithms.md")
    learning.PAGE.write_text(PAGE)
    return learning.PAGE


def test_the_page_gets_its_tables_and_keeps_the_rest(page: Path) -> None:
    found, teachers = [made(recipe, seed) for seed in SEEDS for recipe in MARGINS], dict.fromkeys(SEEDS, 0.9)
    write(found, teachers)
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\n| recipe |") and text.endswith(f"|\n\n{END}\n\nafter\n") and "Not run" not in text
    assert "| grpo | 2 | 40.0 40.0 40.0 | 90.0 90.0 90.0 | +50.0 | +30 | 61 |" in text and "| ppo | 200, 200, 200 |" in text
    written = json.loads(learning.RESULTS.read_text())
    assert len(written["runs"]) == len(found) and written["runs"][0]["rise"] == pytest.approx(50) and written["seeds"] == list(SEEDS)
    write([made(recipe, seed, 0.8) for seed in SEEDS for recipe in MARGINS], teachers)
    again = page.read_text()
    assert "80.0 80.0 80.0" in again and "90.0" not in again and "| ppo | never, never, never |" in again
    assert again.count(BEGIN) == again.count(END) == 1 and again.endswith(f"{END}\n\nafter\n")


@pytest.mark.parametrize("missing", [{"recipe": "sft"}, {"seed": 2}], ids=["a recipe", "a seed"])
def test_a_part_of_the_runs_goes_beside_the_others_and_the_page_gets_the_whole(page: Path, missing: dict) -> None:
    """And what is made anew replaces what was there."""
    found = [made(recipe, seed) for seed in SEEDS for recipe in MARGINS]
    part = [learned for learned in found if missing.items().isdisjoint(vars(learned).items())]
    write(part, dict.fromkeys(SEEDS, 0.9))
    assert page.read_text() == PAGE
    assert [(run["recipe"], run["seed"]) for run in json.loads(learning.RESULTS.read_text())["runs"]] == [(r.recipe, r.seed) for r in part]
    rest = [replace(learned, commit="def") for learned in found if learned not in part]
    write([*rest, made("grpo", after=0.8)], {2: 0.8})
    written = json.loads(learning.RESULTS.read_text())
    assert [(run["recipe"], run["seed"]) for run in written["runs"]] == [(learned.recipe, learned.seed) for learned in found]
    assert sum(run["commit"] == "def" for run in written["runs"]) == len(rest)
    assert written["teacher_accuracy"] == {"0": 0.9, "1": 0.9, "2": 0.8}
    assert "| grpo | 2 | 40.0 40.0 40.0 | 80.0 90.0 90.0 |" in page.read_text()


@pytest.mark.parametrize(("after", "code"), [(0.71, 0), (0.69, 1)])
def test_a_margin_that_is_missed_is_the_exit_code(page: Path, monkeypatch, capsys, tmp_path: Path, after: float, code: int) -> None:
    monkeypatch.setattr(learning, "run", lambda command, folder: None)
    monkeypatch.setattr(learning, "evaluated", lambda *asked: 0.9)
    monkeypatch.setattr(learning, "learn", lambda recipe, seed, folder: made(recipe, seed, after))
    monkeypatch.setattr(sys, "argv", ["learning.py", "--only", "grpo", "--seeds", "0", "--folder", str(tmp_path)])
    assert learning.main() == code
    assert ("missed  grpo, seed 0: +29.0 points, to be +30" in capsys.readouterr().out) == bool(code)
    assert page.read_text() == PAGE
