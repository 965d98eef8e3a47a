"""docs/faults.md lists every case of a fault; that the tests which it names are there is tests/test_documented_defects.py's."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()


def test_every_case_from_1_to_22_is_listed() -> None:
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == set(range(1, 23))
