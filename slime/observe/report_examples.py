"""The answers that a report shows, read out of examples.jsonl without holding the whole of a long run in memory."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

EVAL = "eval/"  # how the source of an evaluation's answer begins


@dataclass(frozen=True, slots=True)
class Example:
    """One answer that was kept for the report."""

    step: int
    prompt: str
    response: str
    reward: float | None
    label: str
    source: str

    @property
    def of_evaluation(self) -> bool:
        return self.source.startswith(EVAL)


def read_examples(path: Path) -> list[Example]:
    """Training answers of the first, a middle and the last step that has some, evaluation answers of the first and the last.

    Steps that a resume trained again count as they came last; a line that a crash tore is left out, and told.
    """
    at = _index(path) if path.exists() else []
    trained, evaluated = sorted({s for s, e, _ in at if not e}), sorted({s for s, e, _ in at if e})
    chosen = {(s, False) for s in (trained[:1] + trained[len(trained) // 2 :][:1] + trained[-1:])}
    chosen |= {(s, True) for s in evaluated[:1] + evaluated[-1:]}
    examples = []
    if chosen:
        with path.open("rb") as file:
            for step, of_evaluation, offset in at:
                if (step, of_evaluation) in chosen:
                    file.seek(offset)
                    examples.append(_example(json.loads(file.readline())))
    return examples


def _index(path: Path) -> list[tuple[int, bool, int]]:
    """(step, of an evaluation, offset) of every line that counts."""
    found: list[tuple[int, bool, int]] = []
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                log.warning("%s: the line at byte %d was torn by a crash and is ignored", path, offset)
            else:
                while found and found[-1][0] > row["step"]:
                    found.pop()
                found.append((row["step"], str(row.get("source", "")).startswith(EVAL), offset))
            offset += len(line)
    return found


def _example(row: dict[str, Any]) -> Example:
    label, source = row.get("label"), row.get("source")
    text = "" if label is None else str(label)
    return Example(row["step"], str(row["prompt"]), str(row["response"]), row.get("reward"), text, str(source or ""))
