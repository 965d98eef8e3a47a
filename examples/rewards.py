"""Reward functions that need no labels: to try a set-up with any model and any prompts."""

from slime.types import Sample


def even_share(sample: Sample) -> float:
    """Share of response tokens with an even id. Any model can raise it, so a flat curve means that something is not wired."""
    return sum(t % 2 == 0 for t in sample.response_ids) / max(1, len(sample.response_ids))
