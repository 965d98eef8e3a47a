"""Training prompts as a pure function of their ordinal: nothing to save, nothing to skip on a resume.

Ordinal -> (file, epoch, position) -> row. With several files, each block of draws holds every file in proportion to its
weight, in an order that the seed fixes; an epoch of a file is a permutation that the seed, the file and the epoch fix.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slime.config import DataConfig, EvalSet
from slime.data.files import Rows, open_rows
from slime.types import Prompt

BLOCK = 1024  # draws over which several files are mixed in proportion


@dataclass
class PromptSource:
    """The prompts of data.train. `prompt(ordinal)` is the same whenever and wherever it is called."""

    cfg: DataConfig
    seed: int

    def __post_init__(self) -> None:
        """Opens and indexes every file, reads its first row. Raises ValueError naming the file and the knob."""
        if not self.cfg.train:
            raise ValueError("data.train is empty: name at least one file, data.train='[{path: prompts.jsonl}]'")
        self._files = [open_rows(f.path, f"data.train.{i}.path") for i, f in enumerate(self.cfg.train)]
        self._quota = _quotas([f.weight for f in self.cfg.train])
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        for rows, file in zip(self._files, self.cfg.train, strict=True):
            to_prompt(rows, 0, 0, self.cfg, file.source)

    def prompt(self, ordinal: int) -> Prompt:
        """The prompt of a draw. Raises ValueError naming the file and row of one that cannot be read."""
        which, draw = self._choose(ordinal)
        rows, file = self._files[which], self.cfg.train[which]
        epoch, position = divmod(draw, len(rows))
        return to_prompt(rows, int(self._permutation(which, epoch)[position]), ordinal, self.cfg, file.source)

    def _choose(self, ordinal: int) -> tuple[int, int]:
        """Which file a draw is from, and how many draws that file had before."""
        if len(self._files) == 1:
            return 0, ordinal
        block, at = divmod(ordinal, BLOCK)
        if self._order is None or self._order[0] != block:
            order = _rng(self.seed, 1, block).permutation(np.repeat(np.arange(len(self._files)), self._quota))
            earlier = np.zeros(BLOCK, np.int64)
            for which in range(len(self._files)):
                mine = order == which
                earlier[mine] = np.arange(mine.sum())
            self._order = (block, order, earlier)
        _, order, earlier = self._order
        which = int(order[at])
        return which, block * int(self._quota[which]) + int(earlier[at])

    def _permutation(self, which: int, epoch: int) -> np.ndarray:
        held = self._epochs.get(which)
        if held is None or held[0] != epoch:
            n = len(self._files[which])
            order = _rng(self.seed, 2, which, epoch).permutation(n) if self.cfg.shuffle else np.arange(n)
            held = self._epochs[which] = (epoch, order)
        return held[1]


def eval_prompts(name: str, eval_set: EvalSet, cfg: DataConfig) -> list[Prompt]:
    """All prompts of an evaluation set, in the file's order, at most `limit`. Raises ValueError naming data.eval.<name>.path."""
    rows = open_rows(eval_set.path, f"data.eval.{name}.path")
    n = min(len(rows), eval_set.limit or len(rows))
    return [to_prompt(rows, i, i, cfg, None) for i in range(n)]


def to_prompt(rows: Rows, i: int, ordinal: int, cfg: DataConfig, source: str | None) -> Prompt:
    """Row i of a file as a Prompt, its columns found by the keys of the config."""
    row = rows.row(i)
    prompt = _column(row, cfg.prompt_key)
    where = f"{rows.path}, row {i + 1}"
    if prompt is None:
        raise ValueError(f"{where}: no column {cfg.prompt_key}; it has {', '.join(row)}: set data.prompt_key")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)):
        raise ValueError(f"{where}: {cfg.prompt_key} is neither a string nor a list of chat messages with a role; set data.prompt_key")
    metadata = _column(row, cfg.metadata_key)
    return Prompt(
        ordinal=ordinal,
        prompt=prompt,
        label=_column(row, cfg.label_key),
        source=str(source or _column(row, cfg.source_key) or Path(rows.path).stem),
        metadata=metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata},
        tools=_column(row, cfg.tools_key),
    )


def _column(row: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _quotas(weights: list[float]) -> np.ndarray:
    """int64 [files]: draws of each file in a block, by largest remainder; at least one."""
    share = np.array(weights) / sum(weights) * BLOCK
    quota = np.maximum(np.floor(share).astype(np.int64), 1)
    for which in np.argsort(quota - share)[: max(0, BLOCK - quota.sum())]:
        quota[which] += 1
    while quota.sum() > BLOCK:
        quota[quota.argmax()] -= 1
    return quota


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
