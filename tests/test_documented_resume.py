"""docs/resume.md against the tests: every test that it names is there, in the file that it names."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "resume.md").read_text()
FILES = {path.name: path.read_text() for path in sorted(TESTS.rglob("test_*.py"))}


def test_every_named_test_is_there() -> None:
    files = set(re.findall(r"(test_\w+\.py)", PAGE))
    assert len(files) > 15 and files <= FILES.keys()
    placed = re.findall(r"(test_\w+\.py)::(test_\w+)", PAGE)
    assert len(placed) > 25 and [f"{file}::{name}" for file, name in placed if f"def {name}(" not in FILES[file]] == []
    named = set(re.findall(r"(?<!/)\b(test_\w+)(?!\w*\.py)\b", PAGE))
    everything = "\n".join(FILES.values())
    assert [name for name in named if f"{name}.py" not in FILES and f"def {name}(" not in everything] == []
