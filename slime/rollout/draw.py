"""Which ordinals a rollout draws, and what became of each. Pure.

    draw = Draw(first=40, wanted=2)
    draw.take() -> 40      draw.take() -> 41      draw.take() -> None        # two are enough as long as none is dropped
    draw.drop(41, "filter")                       draw.take() -> 42
    draw.keep(40); draw.keep(42)                  draw.complete -> True

Only as many are drawn as are wanted, and one more for each that is dropped, so every ordinal ends up kept or dropped and
the batch is the first surviving groups in ordinal order, whichever finished first. With `surplus` (rollout.select=arrival)
that many more are drawn at once, the first finished are kept and the rest are dropped as surplus.
"""

from collections import Counter
from dataclasses import dataclass, field

from slime.config.exits import GateStopped

MOST_DRAWS = 32  # a rollout that drops all but one in this many prompts is given up
MENDS = {  # reason of a drop -> the knob to turn
    "filter": "loosen rollout.filter",
    "truncated": "raise rollout.max_response_tokens or set rollout.mask_truncated=false",
    "too_long": "raise data.max_prompt_tokens (with algorithm.name=sft also rollout.max_response_tokens)",
    "reward_error": "mend the reward (reward.fn or reward.url)",
}


@dataclass
class Draw:
    first: int
    wanted: int
    surplus: int = 0
    next: int = field(init=False)
    kept: set[int] = field(default_factory=set)
    dropped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.next = self.first

    @property
    def drawn(self) -> int:
        return self.next - self.first

    @property
    def under_way(self) -> set[int]:
        return set(range(self.first, self.next)) - self.kept - set(self.dropped)

    @property
    def complete(self) -> bool:
        return len(self.kept) == self.wanted

    def take(self) -> int | None:
        """The next ordinal to draw, None where enough are kept or under way.

        Raises GateStopped where nearly everything is dropped.
        """
        if self.drawn - len(self.dropped) >= self.wanted + self.surplus:
            return None
        if self.drawn >= MOST_DRAWS * self.wanted:
            raise GateStopped(self._given_up())
        self.next += 1
        return self.next - 1

    def keep(self, ordinal: int) -> None:
        assert ordinal in self.under_way
        self.kept.add(ordinal)

    def drop(self, ordinal: int, reason: str) -> None:
        assert ordinal in self.under_way
        self.dropped[ordinal] = reason

    def drop_surplus(self) -> None:
        """Everything still under way is not needed."""
        for ordinal in self.under_way:
            self.dropped[ordinal] = "surplus"

    def _given_up(self) -> str:
        counts = Counter(self.dropped.values()).most_common()
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
        mends = ", ".join(MENDS[reason] for reason, _ in counts)
        return (
            f"rollout: {len(self.dropped)} of {self.drawn} prompts were dropped ({reasons}) and {len(self.kept)} of {self.wanted} kept, "
            f"fewer than one in {MOST_DRAWS}; {mends}"
        )
