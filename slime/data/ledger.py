"""The account of every prompt drawn. Pure; the driver is its only writer.

    drawn -> in flight -> pending (rewarded) -> trained
                 |
                 +-----> dropped, with a reason: filter, too_long, truncated, reward_error, surplus

Ordinals are drawn in order, so the account is one number (`next`), the set that is pending, and counts. One rollout is in flight at a time;
how many prompts it draws shows when it ends, and until then they count as not drawn: a run that is stopped meanwhile draws them again. At
every moment

    drawn = trained + dropped + pending.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from slime.types import RolloutSummary


@dataclass
class Ledger:
    """Which ordinals have been drawn and what became of them."""

    next: int = 0  # the first ordinal that no finished rollout has drawn
    pending: set[int] = field(default_factory=set)  # drawn, rewarded, not trained yet
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> count
    in_flight: int | None = None  # the step whose rollout draws from `next` on

    def begin(self, step: int) -> int:
        """The rollout of `step` starts; returns the ordinal that it draws first."""
        assert self.in_flight is None, f"rollout {step} would draw the prompts of rollout {self.in_flight}, which is in flight"
        self.in_flight = step
        return self.next

    def abandon(self) -> None:
        """What is in flight is given up: whoever goes on from here draws its prompts again."""
        self.in_flight = None

    def record(self, summary: RolloutSummary) -> None:
        """The rollout in flight has ended: it drew `summary.drawn` ordinals from `next` on and accounts for each of them."""
        assert self.in_flight == summary.step, f"rollout {summary.step} has ended, {self.in_flight} is in flight"
        drawn = set(range(self.next, self.next + summary.drawn))
        assert summary.first_ordinal == self.next, f"a rollout drew from ordinal {summary.first_ordinal}, {self.next} is next"
        accounted = [*summary.trained, *summary.dropped]
        assert len(accounted) == len(drawn) and set(accounted) == drawn, (
            f"a rollout lost or repeated prompts: drew {drawn}, accounts for {accounted}"
        )
        self.in_flight = None
        self.next += summary.drawn
        self.pending |= set(summary.trained)
        self.dropped.update(summary.dropped.values())
        self._check()

    def set_aside(self, summary: RolloutSummary) -> None:
        """Take back the last `record`: a finished batch is not trained after all, since a run that replays another begins here."""
        assert self.in_flight is None and summary.first_ordinal + summary.drawn == self.next and set(summary.trained) <= self.pending
        self.next = summary.first_ordinal
        self.pending -= set(summary.trained)
        self.dropped -= Counter(summary.dropped.values())
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
        """JSON values, without what is in flight."""
        return {"next": self.next, "pending": sorted(self.pending), "trained": self.trained, "dropped": dict(self.dropped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        ledger = cls(values["next"], set(values["pending"]), values["trained"], Counter(values["dropped"]))
        ledger._check()
        return ledger

    def _check(self) -> None:
        total = self.trained + self.dropped.total() + len(self.pending)
        assert self.next == total, f"the ledger does not add up: drew {self.next}, accounts for {total}"
