"""Every knob is documented, there are few of them, and their table is current."""

from pathlib import Path

from slime.config.table import table
from slime.config.tree import knobs


def test_few_knobs_each_with_one_line() -> None:
    assert 50 < len(knobs()) < 150
    for knob in knobs():
        assert knob.doc.endswith(".") and len(knob.doc) < 140, knob.path


def test_defaults_keep_their_own_bounds() -> None:
    for knob in (knob for knob in knobs() if knob.default is not None):
        low, high, above = (knob.metadata.get(bound) for bound in ("low", "high", "above"))
        assert low is None or knob.default >= low, knob.path
        assert high is None or knob.default <= high, knob.path
        assert above is None or knob.default > above, knob.path
        assert knob.metadata.get("below") is None or knob.default < knob.metadata["below"], knob.path


def test_table_in_docs_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "knobs.md").read_text()
    assert written == table(), "run `python -m slime.config.table`"
