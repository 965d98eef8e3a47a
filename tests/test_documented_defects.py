"""Pages that say which test shows what, against the tests: every test that they name is there, in the file that they name."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
HEADING = "## What went wrong elsewhere"
PAGES = {path.name: text for path in sorted(DOCS.glob("*.md")) if HEADING in (text := path.read_text())}
FILES = {path.as_posix(): path.read_text() for path in sorted(TESTS.rglob("test_*.py"))}


def defined(name: str, file: str = "") -> bool:
    """Whether a test stands in a file whose path ends so."""
    return any(path.endswith(f"/{file}" if file else "") and f"def {name}(" in text for path, text in FILES.items())


def test_the_pages() -> None:
    assert PAGES.keys() == {"algorithms.md", "faults.md", "resume.md"}


@pytest.mark.parametrize("page", PAGES)
def test_every_named_test_is_there(page: str) -> None:
    text = PAGES[page]
    files = set(re.findall(r"([\w/]*test_\w+\.py)", text))
    assert len(files) > 10 and [file for file in files if not any(path.endswith(f"/{file}") for path in FILES)] == []
    placed = re.findall(r"([\w/]*test_\w+\.py)::(test_\w+)", text)
    assert len(placed) > 20 and [f"{file}::{name}" for file, name in placed if not defined(name, file)] == []
    named = set(re.findall(r"\btest_\w+(?![\w*]*\.py)\b", text)) - {Path(path).stem for path in FILES}
    assert len(named) > 20 and [name for name in named if not defined(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_defect_names_what_shows_that_it_cannot_happen(page: str) -> None:
    rows = [line for line in PAGES[page].split(HEADING)[1].split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    assert [row for row in rows if not re.search(r"\btest_\w+|\bkills\b", row.split("|")[3])] == []
