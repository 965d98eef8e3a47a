"""docs/faults.md against the tests: every test that it names is there, in the file that it names."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text()
FILES = {path: path.read_text() for path in sorted(TESTS.rglob("test_*.py"))}


def test_the_list_names_tests_that_there_are() -> None:
    """And every number of a case from 1 to 22."""
    named = set(re.findall(r"test_\w+(?![\w*]*\.py)\b", PAGE)) - {path.stem for path in FILES}
    written = "\n".join(FILES.values())
    assert len(named) > 50 and not [name for name in named if f"def {name}(" not in written]
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == set(range(1, 23))


def test_tests_are_in_the_files_that_the_list_names() -> None:
    named = re.findall(r"([\w/]*test_\w+\.py)::(test_\w+)", PAGE)
    assert len(named) > 20
    for file, name in named:
        assert any(str(path).endswith(f"/{file}") and f"def {name}(" in text for path, text in FILES.items()), f"{file}::{name}"
