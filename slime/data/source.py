"""Training prompts as a pure function of their ordinal: nothing to save, nothing to skip on a resume.

Ordinal -> (file, epoch, position) -> row. With several files, each block of draws holds every file in proportion to its
weight, in an order that the seed fixes; an epoch of a file is a permutation that the seed, the file and the epoch fix.
"""

from dataclasses import dataclass
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
        """Opens and indexes every file; `first` holds the first row of each. Raises ValueError naming the file and the knob."""
        if not self.cfg.train:
            raise ValueError("data.train is empty: name at least one file, data.train='[{path: prompts.jsonl}]'")
        self._files = [open_rows(f.path, f"data.train.{i}.path") for i, f in enumerate(self.cfg.train)]
        self._quota = _quotas([f.weight for f in self.cfg.train])
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self.first = [to_prompt(rows, 0, 0, self.cfg, file.source) for rows, file in zip(self._files, self.cfg.train, strict=True)]

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
            order = np.repeat(np.arange(len(self._files)), self._quota)[permutation(BLOCK, self.seed, 1, block)]
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
            order = permutation(n, self.seed, 2, which, epoch) if self.cfg.shuffle else np.arange(n)
            held = self._epochs[which] = (epoch, order)
        return held[1]


def eval_prompts(name: str, eval_set: EvalSet, cfg: DataConfig) -> list[Prompt]:
    """All prompts of an evaluation set, in the file's order, at most `limit`. Raises ValueError naming data.eval.<name>.path."""
    rows = open_rows(eval_set.path, f"data.eval.{name}.path")
    n = min(len(rows), eval_set.limit or len(rows))
    return [to_prompt(rows, i, i, cfg, None) for i in range(n)]


def to_prompt(rows: Rows, i: int, ordinal: int, cfg: DataConfig, source: str | None) -> Prompt:
    """Row i of a file as a Prompt, its columns found by the keys of the config.

    Raises ValueError for a column that is missing, naming its knob and the columns there are (label, metadata, tools and source may be
    missing under their default names), and for a value of another kind.
    """
    row = rows.row(i)
    where = f"{rows.path}, row {i + 1}"
    prompt = _column(row, cfg.prompt_key, "data.prompt_key", where)
    if not is_prompt(prompt):
        raise ValueError(
            f"{where}: {cfg.prompt_key} is neither a string nor a list of chat messages with a role, or it is empty; set data.prompt_key"
        )
    metadata = _column(row, cfg.metadata_key, "data.metadata_key", where, DataConfig.metadata_key)
    tools = _column(row, cfg.tools_key, "data.tools_key", where, DataConfig.tools_key)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: {cfg.tools_key} is not a list of tool schemas; set data.tools_key")
    named = source or _column(row, cfg.source_key, "data.source_key", where, DataConfig.source_key)
    return Prompt(
        ordinal=ordinal,
        prompt=prompt if isinstance(prompt, str) else _without_nulls(prompt),
        label=_column(row, cfg.label_key, "data.label_key", where, DataConfig.label_key),
        source=str(named or rows.path.stem),
        metadata=metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata},
        tools=_without_nulls(tools) or None,
    )


def is_prompt(value: Any) -> bool:
    """Whether a value is a string or a list of chat messages, and not empty."""
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)))


def _column(row: dict[str, Any], key: str, knob: str, where: str, default: str = "") -> Any:
    """The value at a key: a column, or dots into nested ones. None where a key that is still its knob's default is missing."""
    if key in row:
        return row[key]
    value: Any = row
    at = "it"
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if key == default:
                return None
            has = ", ".join(value) if isinstance(value, dict) else "no columns"
            raise ValueError(f"{where}: no column {key}; {at} has {has}: set {knob}")
        value, at = value[part], part
    return value


def _without_nulls(value: Any) -> Any:
    """A parquet column gives every struct all fields that any row has, as None; a chat template asks whether a field is there."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _quotas(weights: list[float]) -> np.ndarray:
    """int64 [files]: draws of each file in a block, by largest remainder; at least one."""
    share = np.array(weights) / sum(weights) * BLOCK
    quota = np.maximum(np.floor(share).astype(np.int64), 1)
    for which in np.argsort(quota - share)[: max(0, BLOCK - quota.sum())]:
        quota[which] += 1
    while quota.sum() > BLOCK:
        quota[quota.argmax()] -= 1
    return quota


def permutation(n: int, *key: int) -> np.ndarray:
    """int64 [n]: an order that the key fixes. NumPy promises the raw bits for every version, and not what it makes of them."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")
