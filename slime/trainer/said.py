"""What teachers have said of tokens, before these are trained on."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Said:
    """Of T tokens, 0 outside loss_mask; what algorithm.distill asks for, None otherwise."""

    logprobs: np.ndarray | None = None  # float32 [T], distill=sampled: of the tokens drawn
    ids: np.ndarray | None = None  # int64 [T, k], distill=topk: the teacher's likeliest tokens
    known: np.ndarray | None = None  # float32 [T, k + 1], their log-probs, and of all others together

    @classmethod
    def nothing(cls, distill: str, tokens: int, k: int) -> "Said":
        """Zeros, to be filled by `put`."""
        if distill == "sampled":
            return cls(logprobs=np.zeros(tokens, np.float32))
        return cls(ids=np.zeros((tokens, k), np.int64), known=np.zeros((tokens, k + 1), np.float32))

    def put(self, at: np.ndarray, said: "Said") -> None:
        """Write what was said of the tokens at these positions (int64 [t])."""
        for column in fields(self):
            ours, theirs = getattr(self, column.name), getattr(said, column.name)
            if ours is not None:
                ours[at] = theirs

    def at(self, tokens: np.ndarray | slice) -> "Said":
        """Of these tokens (bool [T], or a slice)."""
        return Said(*(None if (column := getattr(self, c.name)) is None else column[tokens] for c in fields(self)))


@dataclass(frozen=True)
class Heard:
    """What the teachers that are held here have said of a group's samples, those that they teach."""

    tokens: np.ndarray  # int32 [T], of which
    said: Said
