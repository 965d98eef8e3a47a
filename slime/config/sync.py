"""sync: how weights reach the engines."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class SyncConfig:
    mode: str = choice("full")
    """full sends every tensor through stock SGLang's tensor update."""
    bucket_mb: int = number(256, low=1)
    """Weights gathered and sent at a time, in MiB of host memory."""
    timeout_s: float = number(300.0, above=0)
    """Deadline for every engine to hold a published version."""
