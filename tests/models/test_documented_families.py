"""docs/models.md against the code: every family has its rows, and a layout is marked where it is tested."""

import re
from pathlib import Path

from slime.models.registry import FAMILIES, REFUSED
from tests.trainer.test_layouts import LAYOUTS, PRODUCTS, applies

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()
LONGEST = 150  # lines of a family's file


def rows(heading: str) -> list[list[str]]:
    """The cells of the last table under a heading, its head first."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE)[-1]
    lines = [line for line in table.splitlines() if not line.startswith("|---")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_every_family_is_listed() -> None:
    _, *families = rows("Families")
    assert {row[0] for row in families} == set(FAMILIES)
    for row in families:
        assert (row[5] == "not served") == bool(FAMILIES[row[0]].unserved), row
        assert all(float(cell) <= 1e-4 for cell in row[4:] if cell != "not served"), row


def test_layouts_are_marked_where_they_are_tested() -> None:
    head, *families = rows("Layouts")
    assert head[1:] == list(LAYOUTS) and {row[0] for row in families} == set(FAMILIES)
    for family, *cells in families:
        assert [cell == "yes" for cell in cells] == [applies(family, layout) for layout in LAYOUTS], family
    named = PAGE.split("Further products")[1].split("A checkpoint of one layout")[0]
    assert all(name in re.sub(r"\s+", " ", named) for name in PRODUCTS if "layers" not in name)


def test_a_family_is_a_short_file() -> None:
    files = [path for path in (ROOT / "slime/models/families").glob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in files} == set(FAMILIES)
    assert max(len(path.read_text().splitlines()) for path in files) < LONGEST


def test_what_is_refused_is_said() -> None:
    assert set(REFUSED) >= {"qwen3_next", "deepseek_v32", "glm_moe_dsa", "deepseek_v4", "gpt_oss"}
    for name in ("Qwen3-Next", "Qwen3.5", "DeepSeek-V3.2", "GLM-5", "DeepSeek-V4", "GPT-OSS"):
        assert name in PAGE
