"""The account of every prompt drawn: pending, trained, or dropped with a reason. Pure; the driver is its only writer.

Ordinals are drawn in order, so the account is one number (`next`), the set that is pending, and counts. At every moment

    drawn = trained + dropped + pending.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from slime.types import RolloutSummary


@dataclass
class Ledger:
    """Which ordinals have been drawn and what became of them."""

    next: int = 0  # the first ordinal that no rollout has drawn
    pending: set[int] = field(default_factory=set)  # drawn, finished, not trained yet
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> count

    def record(self, summary: RolloutSummary) -> None:
        """A rollout has finished: it drew `summary.drawn` ordinals from `next` on and accounts for each of them."""
        drawn = set(range(self.next, self.next + summary.drawn))
        assert summary.first_ordinal == self.next, f"a rollout drew from ordinal {summary.first_ordinal}, {self.next} is next"
        accounted = [*summary.trained, *summary.dropped]
        assert len(accounted) == len(drawn) and set(accounted) == drawn, (
            f"a rollout lost or repeated prompts: drew {drawn}, accounts for {accounted}"
        )
        self.next += summary.drawn
        self.pending |= set(summary.trained)
        self.dropped.update(summary.dropped.values())
        self._check()

    def train(self, ordinals: list[int]) -> None:
        """An update has trained these prompts."""
        missing = set(ordinals) - self.pending
        assert not missing, f"trained prompts that were not pending: {sorted(missing)}"
        self.pending -= set(ordinals)
        self.trained += len(ordinals)
        self._check()

    def metrics(self) -> dict[str, float]:
        """ledger/{drawn,trained,dropped,pending}."""
        return {
            "ledger/drawn": self.next,
            "ledger/trained": self.trained,
            "ledger/dropped": self.dropped.total(),
            "ledger/pending": len(self.pending),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"next": self.next, "pending": sorted(self.pending), "trained": self.trained, "dropped": dict(self.dropped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        ledger = cls(values["next"], set(values["pending"]), values["trained"], Counter(values["dropped"]))
        ledger._check()
        return ledger

    def _check(self) -> None:
        total = self.trained + self.dropped.total() + len(self.pending)
        assert self.next == total, f"the ledger does not add up: drew {self.next}, accounts for {total}"
