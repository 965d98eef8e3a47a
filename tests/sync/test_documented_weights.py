"""docs/weights.md against the code: knobs, metrics, sub-commands, what failures say, formats, versions of SGLang, measured sizes."""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from slime.cli import sync as cli
from slime.config import SyncConfig
from slime.engine import versions
from slime.engine.settings import LOADER
from slime.sync import chain, codec, fingerprint, manifest, store, wire
from slime.sync.publication import Do
from slime.sync.records import BLOCK
from tests.observe import test_documented_metrics as metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/weights.md").read_text()
ROOMS = ("sync", "engine", "cluster", "cli")
CODE = "\n".join(path.read_text() for room in ROOMS for path in sorted((ROOT / "slime" / room).rglob("*.py")))


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of every table's rows, heads and rulers left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    kept = [line for i, line in enumerate(lines) if "---" not in line and "---" not in "".join(lines[i + 1 : i + 2])]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The sub-commands of `slime sync`."""
    (action,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def test_every_knob_has_its_row_and_nothing_else_has_one() -> None:
    assert [cells[0] for cells in rows(section("Knobs"))] == [f"`sync.{field.name}`" for field in fields(SyncConfig)]


def test_every_choice_of_a_knob_is_explained() -> None:
    told = {cells[0].strip("`").removeprefix("sync."): cells[1] for cells in rows(section("Knobs"))}
    for field in fields(SyncConfig):
        for choice in field.metadata.get("choices", ()):
            assert f"`{choice}`" in told[field.name], f"sync.{field.name}={choice}"


def test_knobs_and_anchors_of_the_page_exist() -> None:
    known = set(re.findall(r"`([\w.<>]+)`", (ROOT / "docs/knobs.md").read_text()))
    named = set(re.findall(r"(?<![\w./])((?:run|rollout|trainer|sync)\.[a-z_]+(?:\.[a-z_]+)*)", PAGE))
    assert {n for n in named if n not in known and not n.startswith("rollout.sglang.")} == set()
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings


def test_every_metric_of_the_channel_is_named() -> None:
    recorded = {name for name in metrics.recorded() if name.startswith("sync/")} | {"time/sync_s"}
    assert len(recorded) > 10 and set(re.findall(r"`(\w+/\w+)`", section("Metrics"))) == recorded


def test_every_sub_command_is_shown_with_options_that_exist() -> None:
    text = section("The history of a run: `slime sync`")
    shown = re.findall(r"^\$ slime sync (\w+) (.*)$", text, re.MULTILINE)
    assert {name for name, _ in shown} == parsers().keys()
    for name, line in shown:
        parsers()[name].parse_args(line.split())
    options = {option for parser in parsers().values() for option in parser._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= options


def test_formats_are_those_of_the_code() -> None:
    text = section("Files of a store")
    assert f"`{wire.MAGIC.decode()}` format {wire.VERSION}:" in text and f'"format":{manifest.FORMAT}' in text
    assert f"<run_id>/{store.LATEST} " in text and f"<run_id>/{store.LEASES}/" in text
    folders = [store.Artefact(0, 123), store.Artefact(0, 123, manifest.ANCHOR), store.Artefact(0, 123, manifest.FOLD, (0, 115))]
    for artefact in folders:
        assert f"<run_id>/{artefact.folder}/" in text
    part = manifest.PartRef.of(0, b"bytes").name
    assert re.search(r"/part-0000\.[0-9a-f]{16} ", text) and re.fullmatch(r"part-0000\.[0-9a-f]{16}", part)


def test_forms_and_sizes_are_those_of_the_codec() -> None:
    text = section("What is sent, and why nothing is lost")
    assert {name for cells in rows(text) for name in re.findall(r"`(\w+)`", cells[0])} == set(codec.METHODS.values())
    assert BLOCK == 2**20 and "2^20 elements" in text and f"{wire.DENSE_AT:.0%}".replace("%", " %") in text


def test_the_fingerprint_is_the_one_of_the_code() -> None:
    """The formula on the page, evaluated, and the bounds of the code's own docstring."""
    import numpy as np

    text, mask = section("The proof"), 2**64 - 1
    assert "F = sum over words i of  U(i >> 10) * V[i & 1023] * word_i" in text
    words = np.arange(1, 3000, dtype=np.uint16)
    key = fingerprint.run_key("run")
    table, tensor = fingerprint.table(key), fingerprint.tensor_key(key, "w")

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    u = [mix((tensor + (h + 1) * 0x9E3779B97F4A7C15) & mask) | 1 for h in range(3)]
    found = sum(u[i >> 10] * int(table[i & 1023]) * int(word) for i, word in enumerate(words)) & mask
    assert found == fingerprint.full(words, tensor, table) and len(table) == 1024
    bounds = re.findall(r"2\^-\d\d", text)
    assert bounds == ["2^-41", "2^-55", "2^-48"] and all(bound in str(fingerprint.__doc__) for bound in bounds)


@pytest.mark.parametrize(
    "words",
    [
        "were not published:",
        "the live bits of",
        "are not the trainer's",
        "did not come to weights",
        "; fenced: ",
        "changed unasked",
        "refused to",
        "the live weights are not",
        "has other bits",
        "was altered (its digest does not match)",
        "tensors decode to other bits than the trainer's",
        "gets no requests",
        "a process died or was lost",
        "a staged file of",
        "publishes this run",
        "must stop: one run has one trainer",
        "does not join:",
        "in another form",
        "it is loaded whole and not proven by its bits",
    ],
)
def test_what_the_page_says_that_you_see_is_said(words: str) -> None:
    assert words in CODE and words in PAGE


def test_actions_that_messages_begin_with_exist() -> None:
    assert set(re.findall(r"engine \d: (\w+) failed", PAGE)) <= {str(do) for do in Do}


def test_versions_of_sglang_are_those_of_the_table() -> None:
    (head,) = re.findall(r"^\| \| (0\.5.*) \|$", section("SGLang versions"), re.MULTILINE)
    starts = [tuple(map(int, column.split(" - ")[0].split("."))) for column in head.split(" | ")]
    assert starts == [first for first, _ in versions.TABLE]
    assert head.endswith(".".join(map(str, versions.NEWEST))) and f"--custom-weight-loader {LOADER}" in PAGE
    facts = [row for _, row in versions.TABLE]
    told = {
        "sync.pause=retract": ("yes", [f.flush_while_retracted for f in facts]),
        "which tokens": ("told by SGLang", [f.version_spans for f in facts]),
        "in a session": ("yes", [f.update_session for f in facts]),
    }
    shown = rows(section("SGLang versions"))
    assert len(shown) == len(told) == len(fields(versions.Facts))
    for cells, (words, (means, holds)) in zip(shown, told.items(), strict=True):
        assert words in cells[0] and [cell == means for cell in cells[1:]] == holds


def test_figures_of_the_codec_are_those_that_were_measured() -> None:
    """Sizes: they do not depend on the machine."""
    measured: dict[str, dict[str, float]] = {}
    for row in json.loads((ROOT / "benchmarks/results/sync_codec.json").read_text())["rows"]:
        if row["pair"].startswith("Adam"):
            measured.setdefault(row["pair"], {"changed": row["changed"]})[row["encoding"].split()[0]] = row["bits"]
    shown = rows(section("Figures").split("<!-- codec: bits -->")[1].split("\n\n")[0])
    assert len(shown) == len(measured)
    for cells, bits in zip(shown, measured.values(), strict=True):
        assert cells[0] == f"{bits['changed']:.2%}"
        assert cells[1:6] == [f"{bits[name]:.4f}" for name in ("COO", "xor", "gap16", "steps", "exponent")]
        assert cells[6:] == [f"{16 / bits[name]:.0f}x smaller" for name in ("steps", "exponent")]


def test_anchors_come_when_the_page_says() -> None:
    assert "more than half of its bytes" in PAGE and "more than half of an anchor's bytes" in str(chain.anchor_due.__doc__)
